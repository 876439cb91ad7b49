"""Pruned prompts on the path of a GPU, its kernels interpreted: see `interpreted.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import interpreted
import pytest
import torch
from harness import BLOCK, Answer, Ask, Engine, running
from reference import Reference
from traffic import OFF, Source

from uncomp.engine import activate
from uncomp.engine.settings import CPU_WORKER

STARTS = (1, 2)
SETTINGS: dict[str, Any] = {
    "policy": "uniform",
    "keep": 1.0,
    "prefill_keep": 1.0,
    "prefill_stages": "1,2",
    "prefill_floor": 96,
    "min_tokens": 64,
    "recompact_every": 32,
    "window": 16,
}
ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 60_000_000,
}
HALF = {"kv_prefill_keep": 0.5, "kv_report": True}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")


@pytest.fixture(scope="module")
def model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return interpreted.short_model(demo_model, tmp_path_factory.mktemp("short"), 3)


@pytest.fixture(scope="module")
def source(model: Path) -> Source:
    return Source(model)


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    trace = str(tmp_path_factory.mktemp("trace"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(activate.WORKERS, "cpu", interpreted.WORKER)
        with running(model, {**SETTINGS, "trace": trace}, **ARGUMENTS) as engine:
            yield engine


def _asks(source: Source) -> list[Ask]:
    """Pruned, compressed, both, neither; decoding beside prompts that are read."""
    attention = {**HALF, "kv_settings": '{"prefill_scores": "attention"}'}
    return [
        Ask("pruned", source.take(237), tokens=8, extra=HALF),
        Ask("attention", source.take(190), tokens=4, extra=attention),
        Ask("compressed too", source.take(301), tokens=40, extra={**HALF, "kv_keep": 0.3}),
        Ask("in blocks", source.take(12 * BLOCK), tokens=8, extra={**HALF, "kv_keep": 0.3}),
        Ask(
            "protected",
            source.take(220),
            tokens=4,
            extra={**HALF, "kv_protect": "40:90", "kv_keep": 0.6},
        ),
        Ask("only compressed", source.take(180), tokens=8, extra={"kv_keep": 0.4}),
        Ask("off", source.take(100), tokens=4, extra=OFF),
        Ask("short", source.take(90), tokens=4, extra=HALF),
    ]


@pytest.fixture(scope="module")
def answers(engine: Engine, source: Source) -> dict[str, Answer]:
    before = engine.report()
    engine.llm.collective_rpc("warm_up_compression")  # must leave nothing behind
    answers = {name: answer for name, [answer] in engine.serve(_asks(source)).items()}
    after = engine.report()
    ran = after["decode_steps"] - before["decode_steps"]
    assert after["decode_executions"] == [n + ran for n in before["decode_executions"]]
    return answers


def test_answers_are_those_of_a_model_that_masks_what_stopped(
    engine: Engine, model: Path, answers: dict[str, Answer]
) -> None:
    assert engine.report()["worker"] == "InterpretedWorker"
    reference = Reference(model, torch.float32)
    for name, answer in answers.items():
        kept, pruned = engine.trace(answer.request_id), engine.pruned(answer.request_id)
        expected = reference.logprobs(answer.prompt, answer.tokens, kept, pruned)
        for row, step in zip(expected, answer.logprobs, strict=True):
            for token, logprob in step.items():
                # float32 in another order of sums, as in test_equality.py
                assert logprob == pytest.approx(float(row[token]), abs=5e-4), name
    assert engine.leftovers() == {}


def test_what_was_pruned_and_what_was_compacted(engine: Engine, answers: dict[str, Answer]) -> None:
    pruned = {name for name, a in answers.items() if engine.pruned(a.request_id)}
    assert pruned == {"pruned", "attention", "compressed too", "in blocks", "protected"}
    compacted = {name: len(engine.trace(a.request_id)) for name, a in answers.items()}
    assert compacted == {
        **dict.fromkeys(compacted, 0),
        "compressed too": 2,
        "only compressed": 1,
        "in blocks": 1,
        "protected": 1,
    }
    assert engine.counters()["choose_seconds"] > 0
    [record] = engine.pruned(answers["compressed too"].request_id)
    left = [set(kept) for kept in record["kept"]]
    assert [len(kept) for kept in left] == [301, 301 - 2 * BLOCK, 301 - 4 * BLOCK]
    # A layer keeps of what it has read, and positions are those of the prompt.
    for compaction in engine.trace(answers["compressed too"].request_id)[:1]:
        for kept, heads in zip(left, compaction["kept"], strict=True):
            assert all(set(head) <= kept for head in heads)
    [record] = engine.pruned(answers["protected"].request_id)
    assert set(range(40, 90)) <= set(record["kept"][-1])
    for heads in engine.trace(answers["protected"].request_id)[0]["kept"]:
        assert all(set(range(40, 90)) | {0, 1, 2, 3} <= set(head) for head in heads)


def test_preempted_prompts_are_pruned_again(engine: Engine, model: Path, source: Source) -> None:
    # Seven blocks each, and an eighth after a few tokens.
    asks = [Ask(f"p{n}", source.take(n), tokens=6, extra=HALF) for n in (220, 222)]
    before = engine.metric("num_preemptions")
    with engine.pool_of(14):
        answers = engine.serve(asks)
    assert engine.metric("num_preemptions") > before
    reference = Reference(model, torch.float32)
    for name, [answer] in answers.items():
        pruned = engine.pruned(answer.request_id)
        expected = reference.logprobs(answer.prompt, answer.tokens, (), pruned)
        for row, step in zip(expected, answer.logprobs, strict=True):
            for token, logprob in step.items():
                assert logprob == pytest.approx(float(row[token]), abs=5e-4), name


def test_device_and_host_prune_alike(
    engine: Engine, model: Path, answers: dict[str, Answer], source: Source, tmp_path: Path
) -> None:
    """The same prompts on vLLM's CPU worker: same tokens go on, same bytes are counted.

    The last test: vLLM has room for one engine in a process.
    """
    names = ("pruned", "attention", "compressed too", "protected")
    ours = {name: engine.pruned(answers[name].request_id) for name in names}
    asks = [
        Ask(ask.name, answers[ask.name].prompt, tokens=ask.tokens, extra=ask.extra)
        for ask in _asks(Source(model))
        if ask.name in names
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(activate.WORKERS, "cpu", CPU_WORKER)  # `engine` has put its own there
        host_settings = {**SETTINGS, "trace": str(tmp_path)}
        with running(model, host_settings, **ARGUMENTS) as host:
            assert host.report()["worker"] == "CompactingCPUWorker"
            theirs = {name: answer for name, [answer] in host.serve(asks).items()}
            kept = {name: host.pruned(answer.request_id) for name, answer in theirs.items()}
    for name, answer in theirs.items():
        [a], [b] = kept[name], ours[name]
        for left, right in zip(a["kept"], b["kept"], strict=True):
            # Scores are sums in another order: ties may go another way.
            assert len(left) == len(right)
            assert len(set(left) & set(right)) >= 0.99 * len(left)
        assert answer.facts == answers[name].facts
