"""Many short mixed requests against a live engine: scheduler and worker in their own processes.

Compressed, opted out, aborted and preempted requests arrive while others run. Afterwards every
block is back, no state is left, and opted-out requests were answered as by the unmodified engine.
`UNCOMP_SOAK_REQUESTS` sets how many (default 200).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness import BLOCK, Ask, running
from traffic import Source

from uncomp.engine.counters import open_counters

REQUESTS = int(os.environ.get("UNCOMP_SOAK_REQUESTS", "200"))
ENGINE = {
    "dtype": "float32",  # so that equal answers mean equal engines, see test_equality.py
    "max_model_len": 704,
    "enforce_eager": True,
    "block_size": BLOCK,
    "max_num_seqs": 24,
    "max_num_batched_tokens": 512,
}
# A small window, so that short prompts are worth compressing too.
SETTINGS = {"keep": 0.25, "min_tokens": 64, "recompact_every": 32, "window": 8}
#: blocks of the pool: one long request takes half of it
POOL = 44
AT_ONCE = 40


@dataclass(frozen=True)
class Plan:
    """One request of the soak: `abort_at` as in `Ask`."""

    ask: Ask
    compressed: bool


@dataclass
class Soaked:
    """What came out."""

    plans: Sequence[Plan]
    tokens: dict[str, list[int]]
    counters: dict[str, float]
    report: dict[str, Any]
    preemptions: float
    hits: float


def _plans(model: Path) -> list[Plan]:
    source = Source(model)
    beginnings = [source.take(600) for _ in range(12)]
    plans = []
    for i in range(REQUESTS):
        draw = random.Random(i)
        length = int(5 * 120 ** draw.random())
        # Half of the prompts share a beginning with others.
        if draw.random() < 0.5:
            shared = draw.choice(beginnings)[: int(length * draw.random())]
        else:
            shared = ()
        prompt = shared + source.take(length - len(shared))
        kind = draw.choices(["on", "own", "off"], [0.5, 0.2, 0.3])[0]
        extra: dict[str, Any] = {
            "on": {},
            "own": draw.choice([{"kv_keep": 0.5}, {"kv_budget": 48}, {"kv_protect": "-24:,:9"}]),
            "off": {"kv_compress": False},
        }[kind]
        tokens = draw.randint(1, 40)
        abort_at = draw.randint(0, tokens) if draw.random() < 0.15 else None
        plans.append(Plan(Ask(str(i), prompt, tokens, extra, abort_at=abort_at), kind != "off"))
    return plans


async def _ask(engine: Any, ask: Ask, answers: dict[str, list[int]]) -> None:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=ask.tokens, ignore_eos=True, extra_args=ask.extra or None
    )
    stream = engine.generate({"prompt_token_ids": list(ask.prompt)}, params, ask.name)
    async for output in stream:
        tokens = list(output.outputs[0].token_ids)
        if ask.abort_at and len(tokens) >= ask.abort_at:
            await engine.abort(ask.name)
            return
        if output.finished:
            answers[ask.name] = tokens


async def _client(engine: Any, ask: Ask, answers: dict[str, list[int]], room: Any) -> None:
    async with room:
        if ask.abort_at != 0:
            await _ask(engine, ask, answers)
            return
        # A client that hangs up while its request waits or is in its prefill.
        task = asyncio.create_task(_ask(engine, ask, {}))
        await asyncio.sleep(0.02)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _soak(model: Path) -> Soaked:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.reader import get_metrics_snapshot

    arguments = AsyncEngineArgs(
        model=str(model),
        num_gpu_blocks_override=POOL,
        kv_cache_memory_bytes=200_000_000,
        additional_config={"uncomp": SETTINGS},
        **ENGINE,  # type: ignore[arg-type]
    )
    engine = AsyncLLM.from_engine_args(arguments)
    try:
        plans = _plans(model)
        answers: dict[str, list[int]] = {}
        room = asyncio.Semaphore(AT_ONCE)
        await asyncio.gather(*(_client(engine, plan.ask, answers, room) for plan in plans))
        # The worker learns of the last requests' end with the next step.
        await _ask(engine, Ask("flush", (1,), 1, {"kv_compress": False}), {})
        [report] = await engine.collective_rpc("uncomp_report")
        [counters] = open_counters(engine.vllm_config.instance_id)
        values = {m.name: m.value for m in get_metrics_snapshot() if hasattr(m, "value")}
        return Soaked(
            plans,
            answers,
            counters.snapshot(),
            report,
            values["vllm:num_preemptions"],
            values["vllm:prefix_cache_hits"],
        )
    finally:
        engine.shutdown()


@pytest.fixture(scope="module")
def soaked(demo_model: Path) -> Soaked:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        return asyncio.run(_soak(demo_model))


def test_everyone_was_answered(soaked: Soaked) -> None:
    """Requests that nobody gave up on have all their tokens."""
    expected = {p.ask.name: p.ask.tokens for p in soaked.plans if p.ask.abort_at is None}
    got = {name: len(tokens) for name, tokens in soaked.tokens.items() if name in expected}
    assert got == expected


def test_it_was_a_soak(soaked: Soaked) -> None:
    """Requests were preempted, compressed, compacted again, aborted; prefixes were found."""
    assert soaked.preemptions > REQUESTS // 100
    assert soaked.counters["requests_compressed"] > REQUESTS // 4
    assert soaked.counters["compactions"] > soaked.counters["requests_compressed"]
    assert soaked.counters["blocks_held_max"] > 0.9 * POOL
    assert soaked.hits > 0
    assert sum(plan.ask.abort_at is not None for plan in soaked.plans) > REQUESTS // 20


def test_nothing_is_left(soaked: Soaked) -> None:
    """Every block is back in the pool; the worker holds no table and no query."""
    assert soaked.counters["blocks_held"] == 0
    assert soaked.report["compressed_requests"] == 0
    assert soaked.report["recorded_requests"] == 0
    assert soaked.counters["orders_sent"] == soaked.report["orders_run"]
    assert soaked.counters["orders_sent"] == soaked.counters["compactions"]
    assert soaked.counters["refused_invalid_settings"] == 0


def test_opted_out_answers_equal_unmodified_engine(soaked: Soaked, demo_model: Path) -> None:
    """Whatever went on beside them."""
    asks = [p.ask for p in soaked.plans if not p.compressed and p.ask.abort_at is None]
    assert len(asks) > REQUESTS // 10
    with running(demo_model, None, **ENGINE) as engine:
        stock = engine.serve(asks)
    for ask in asks:
        assert soaked.tokens[ask.name] == stock[ask.name][0].tokens, ask.name
