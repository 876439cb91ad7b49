"""From what vLLM's client says and what was sampled to the numbers of one load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uncomp.eval.bench.serve_client import PERCENTILES
from uncomp.eval.bench.serve_plan import Load, Session
from uncomp.eval.bench.serve_records import Measured, Pool
from uncomp.eval.bench.serve_sampling import Scrape, columns, differences

#: name -> title, unit. Latencies are vLLM's: TTFT to the first token, TPOT the mean time per
#: further token of a request, ITL the time between two tokens.
METRICS: dict[str, tuple[str, str]] = {
    "output_throughput": ("output throughput", "tokens/s"),
    "total_throughput": ("prompt and output throughput", "tokens/s"),
    "request_throughput": ("request throughput", "requests/s"),
    **{
        f"{name}_p{p}": (f"{name.upper()} p{p}", "ms")
        for name in ("ttft", "tpot", "itl")
        for p in PERCENTILES
    },
    "in_flight_peak": ("requests in flight, peak", ""),
    "running_peak": ("requests running, peak", ""),
    "running_mean": ("requests running, mean", ""),
    "preemptions": ("preemptions", ""),
    "held_peak": ("KV held, peak", "MB"),
    "held_mean": ("KV held, mean", "MB"),
    "held_peak_share": ("KV held of the pool, peak", "%"),
    "held_mean_share": ("KV held of the pool, mean", "%"),
    "pool_tokens": ("KV pool", "tokens"),
    "block_size": ("KV block", "tokens"),
    "compactions": ("compactions", ""),
    "joules_per_token": ("energy per output token", "J"),
    "completed": ("requests completed", ""),
    "failed": ("requests failed", ""),
    "other_length": ("answers of another length", ""),
}


def measured(
    session: Session,
    load: Load,
    result: Mapping[str, Any],
    scrapes: list[Scrape],
    missed: int,
    expected: Sequence[int],
    pool: Pool,
    facts: Mapping[str, str],
) -> Measured:
    """The numbers of one load.

    Args:
        result: of ``vllm.benchmarks.serve``, with details.
        scrapes, missed: readings of ``/metrics`` over the load, and how many failed.
        expected: tokens of every answer, in the order of the requests; or one for all.
    """
    begin = min(t for t in result["start_times"] if t > 0)
    sampled = columns(scrapes, begin, begin + result["duration"])
    metrics = {
        "output_throughput": result["output_throughput"],
        "total_throughput": result["total_token_throughput"],
        "request_throughput": result["request_throughput"],
        "in_flight_peak": in_flight(result),
        "completed": result["completed"],
        "failed": result["failed"],
        "other_length": _other_lengths(result, expected),
        "pool_tokens": pool.tokens,
        "block_size": pool.block_size,
    }
    if result["completed"]:
        for name in ("ttft", "tpot", "itl"):
            for p in PERCENTILES:
                metrics[f"{name}_p{p}"] = result[f"p{p}_{name}_ms"]
    metrics |= _held(sampled, pool)
    counted = differences(scrapes, begin, begin + result["duration"])
    joules = counted.pop("joules", None)
    if joules is not None and result["total_output_tokens"]:
        metrics["joules_per_token"] = joules / result["total_output_tokens"]
    metrics |= counted
    return Measured(
        session.arm,
        session.round,
        load.mode,
        load.level,
        result["duration"],
        {name: float(value) for name, value in metrics.items()},
        sampled,
        missed,
        tuple(dict.fromkeys(e.strip() for e in result["errors"] if e))[:10],
        pool,
        facts,
    )


def in_flight(result: Mapping[str, Any]) -> int:
    """Most answered requests open at once; vLLM's own figure counts per second, so too many."""
    events = []
    for start, seconds in zip(result["start_times"], result["latencies"], strict=True):
        if seconds > 0:
            events += [(start, 1), (start + seconds, -1)]
    most = now = 0
    for _, change in sorted(events):  # at equal times an end counts before a start
        now += change
        most = max(most, now)
    return most


def _other_lengths(result: Mapping[str, Any], expected: Sequence[int]) -> int:
    lengths = result["output_lens"]
    wanted = expected if len(expected) == len(lengths) else [expected[0]] * len(lengths)
    # A failed request has length 0 and is counted as failed.
    return sum(got not in (0, want) for got, want in zip(lengths, wanted, strict=True))


def _held(sampled: Mapping[str, list[float]], pool: Pool) -> dict[str, float]:
    held, running = sampled["held"], sampled["running"]
    if not held:
        return {}
    peak, mean = max(held), sum(held) / len(held)
    found = {
        "held_peak_share": 100 * peak,
        "held_mean_share": 100 * mean,
        "running_peak": max(running),
        "running_mean": sum(running) / len(running),
    }
    size = pool.usable_bytes
    if size is not None:
        found |= {"held_peak": peak * size / 1e6, "held_mean": mean * size / 1e6}
    return found
