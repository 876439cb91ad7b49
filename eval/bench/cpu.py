"""Speed and memory of the CPU path: what compression brings, and what it costs.

Four comparisons, each with both sides on the same machine in one run:

1. decode throughput of 8 long requests: compressed, uncompressed in the same pool, and 8 prompts as
   short as the kept part on stock vLLM (what no compression can beat);
2. scoring and moving against prefill time;
3. requests running at once in a pool that holds two full ones;
4. stock vLLM against uncomp installed but not asked for, and against requests that opt out: side by
   side, each on a core of its own, then the other way round. Engines that run minutes apart differ
   by more than the 2 % that matter here; what slows a machine down slows both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import Any

from uncomp.config import UncompConfig
from uncomp.eval.bench.engines import run_arm
from uncomp.eval.bench.rows import Row, judge

NAME = "cpu"
OFF = {"kv_compress": False}
# vLLM loads all plugins that it finds, its own among them: stock goes without ours only.
_OTHERS = ",".join(
    point.name
    for point in entry_points(group="vllm.general_plugins")
    if not point.value.startswith("uncomp.")
)
#: how stock vLLM is compared with uncomp that is not used: whether it is on, environment
ARMS: dict[str, tuple[bool, dict[str, str]]] = {
    "stock": (False, {"VLLM_PLUGINS": _OTHERS}),
    "installed, not asked for": (False, {}),
    "on, requests opt out": (True, {}),
}


@dataclass(frozen=True)
class Setting:
    """What to run.

    Attributes:
        model: checkpoint folder or hub name.
        requests, tokens, output: batch size, prompt length, generated tokens.
        keep: keep ratio.
        block_size: of every engine, so that all use the same kernels.
        rounds, repeat: pairs of engines, each the other way round too, and runs of each engine.
            Engines differ by more than runs do, so an engine counts with its median run.
        threads: cores given to the engine, vLLM's ``VLLM_CPU_OMP_THREADS_BIND`` syntax.
        dtype: of the model and its cache; "auto" is the checkpoint's. A CPU without bfloat16 of its
            own is many times faster in float32.
    """

    model: str
    requests: int = 8
    tokens: int = 6000
    output: int = 128
    keep: float = 0.05
    policy: str = UncompConfig.policy
    block_size: int = 32
    rounds: int = 2
    repeat: int = 6
    threads: str = "0-1"
    dtype: str = "auto"

    @property
    def load(self) -> str:
        """What the long requests are, for the rows."""
        dtype = "" if self.dtype == "auto" else f" in {self.dtype}"
        return f"{self.requests} x {self.tokens} tokens{dtype}"

    @property
    def per_request_blocks(self) -> int:
        return math.ceil((self.tokens + self.output) / self.block_size)

    def arm(
        self, blocks: int, runs: list[dict[str, Any]], uncomp: bool, **env: str
    ) -> dict[str, Any]:
        """An engine with a pool of ``blocks``; with or without compression."""
        cores = len(self.threads.split("-"))
        engine: dict[str, Any] = {
            "max_model_len": self.tokens + self.output + self.block_size,
            "dtype": self.dtype,
            "max_num_seqs": 2 * self.requests,
            "max_num_batched_tokens": 2048,
            "block_size": self.block_size,
            "num_gpu_blocks_override": blocks + 1,  # one is vLLM's null block
            "kv_cache_memory_bytes": 4 << 30,  # only checked; the line above sets the pool
        }
        if uncomp:
            engine["additional_config"] = {"uncomp": {"keep": self.keep, "policy": self.policy}}
        threads = {"VLLM_CPU_OMP_THREADS_BIND": self.threads, "OMP_NUM_THREADS": str(cores)}
        return {"model": self.model, "engine": engine, "env": {**threads, **env}, "runs": runs}


def bench(setting: Setting, say: Callable[[str], None]) -> list[Row]:
    """Run all comparisons; ``say`` reports progress.

    Raises:
        ValueError: not at least two cores; engines are compared side by side.
    """
    if len(setting.threads.split("-")) != 2:
        raise ValueError(f"threads={setting.threads!r}: must name at least two cores, e.g. 0-1")
    rows: list[Row] = []
    short = max(1, round(setting.keep * setting.tokens))
    say("1/3 eight long requests, compressed and not, in the same pool")
    long_arm = _long(setting)
    say("2/3 the same in a pool that holds two full requests")
    tight = _tight(setting)
    say(f"3/3 prompts of {short} tokens: stock")
    on, environment = ARMS["stock"]
    stock = [_short(setting, short, on, **environment) for _ in range(2)]
    shares: dict[str, list[float]] = {name: [] for name in ARMS if name != "stock"}
    for i in range(setting.rounds):
        for name in shares:
            say(f"3/3 prompts of {short} tokens: {name}, beside stock, round {i + 1}")
            pair = [_beside_stock(setting, short, name, swap) for swap in (False, True)]
            shares[name].append(math.sqrt(math.prod(pair)))  # one core may be the faster one
    rows += _decode_rows(setting, long_arm, stock, short)
    rows += _cost_rows(setting, long_arm)
    rows += _pool_rows(setting, tight)
    rows += _off_rows(setting, stock, shares, short)
    return rows


def _request(setting: Setting, name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "count": setting.requests,
        "length": setting.tokens,
        "max_tokens": setting.output,
        **changes,
    }


def _long(setting: Setting) -> dict[str, Any]:
    blocks = setting.requests * setting.per_request_blocks + 16
    runs = [
        _request(setting, "compressed"),
        # Hits the prefix cache for most of the prompt: only its decoding is compared.
        _request(setting, "full", extra_args=OFF),
    ]
    return run_arm(setting.arm(blocks, runs, uncomp=True))


def _tight(setting: Setting) -> dict[str, Any]:
    blocks = 2 * setting.per_request_blocks
    compressed = run_arm(setting.arm(blocks, [_request(setting, "compressed")], uncomp=True))
    full = run_arm(setting.arm(blocks, [_request(setting, "full", extra_args=OFF)], uncomp=True))
    return {"compressed": compressed["compressed"][0], "full": full["full"][0]}


def _short(setting: Setting, length: int, uncomp: bool, **env: str) -> float:
    run = _request(setting, "short", length=length, repeat=setting.repeat)
    run["extra_args"] = OFF if uncomp else None
    blocks = setting.requests * math.ceil((length + setting.output) / setting.block_size) + 16
    arm = setting.arm(blocks, [run], uncomp, **env)
    arm["engine"]["max_model_len"] = length + setting.output + setting.block_size
    return statistics.median(repeat["decode_rate"] for repeat in run_arm(arm)["short"])


def _beside_stock(setting: Setting, length: int, name: str, swap: bool) -> float:
    """Decode throughput of an arm over that of stock vLLM, at the same time, a core each."""
    first, last = (int(core) for core in setting.threads.split("-"))
    cores = (last, first) if swap else (first, last)
    with ThreadPoolExecutor(2) as pool:
        found = [
            pool.submit(_short, replace(setting, threads=str(core)), length, on, **environment)
            for core, (on, environment) in zip(cores, (ARMS["stock"], ARMS[name]), strict=True)
        ]
        stock, own = (one.result() for one in found)
    return own / stock


def _decode_rows(
    setting: Setting, arm: dict[str, Any], stock: list[float], short: int
) -> list[Row]:
    rate = arm["compressed"][0]["decode_rate"]
    full = arm["full"][0]["decode_rate"]
    bound = statistics.median(stock)
    what = setting.load
    return [
        _row(f"{what}, keep {setting.keep}", "decode throughput", "tokens/s", [rate]),
        _row(f"{what}, full KV, same pool", "decode throughput", "tokens/s", [full]),
        _row(f"keep {setting.keep} over full KV", "decode speed-up", "x", [rate / full], least=2.2),
        _row(
            f"keep {setting.keep} over stock on {short} tokens",
            "share of the physical limit",
            "",
            [rate / bound],
            least=0.85,
        ),
    ]


def _cost_rows(setting: Setting, arm: dict[str, Any]) -> list[Row]:
    run = arm["compressed"][0]
    counters = run["counters"]
    spent = counters["score_seconds"] + counters["move_seconds"]
    what = f"{setting.load}, keep {setting.keep}"
    kept = counters["tokens_kept"] / counters["tokens_seen"]
    return [
        _row(what, "prefill", "s", [run["prefill_seconds"]]),
        _row(what, "scoring", "s", [counters["score_seconds"]]),
        _row(what, "moving", "s", [counters["move_seconds"]]),
        _row(
            what,
            "scoring and moving over prefill",
            "%",
            [100 * spent / run["prefill_seconds"]],
            most=3.0,
        ),
        _row(what, "kept over seen tokens", "", [kept]),
    ]


def _pool_rows(setting: Setting, arms: dict[str, Any]) -> list[Row]:
    rows = []
    for name, least in (("compressed", 6.0), ("full", None)):
        run = arms[name]
        counters = run["counters"]
        what = f"pool of 2 full requests, {name}"
        running = counters["requests_running_max"]
        rows += [
            _row(what, "requests running at once", "", [running], least=least),
            _row(what, "time for all", "s", [run["total_seconds"]]),
            _row(what, "preemptions", "", [run["preemptions"]]),
        ]
    return rows


def _off_rows(
    setting: Setting, stock: list[float], shares: dict[str, list[float]], short: int
) -> list[Row]:
    what = f"{setting.requests} x {short} tokens"
    rows = [_row(f"{what}, stock", "decode throughput", "tokens/s", stock)]
    for name, found in shares.items():
        percent = [100 * share for share in found]
        where = f"{what}, {name}, beside stock"
        rows.append(_row(where, "of stock throughput", "%", percent, least=98.0))
    return rows


def _row(
    setting: str,
    metric: str,
    unit: str,
    values: list[float],
    least: float | None = None,
    most: float | None = None,
) -> Row:
    return judge(NAME, setting, metric, unit, values, least, most)
