"""The path of a GPU in a real engine, its kernels interpreted: see `interpreted.py`.

A model of two layers keeps it short. As in `test_equality.py`: nothing to drop and everything
relocated answer like the unmodified engine; dropping answers like the masked reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import interpreted
import pytest
import torch
from harness import Ask, running
from interpreted import assert_as_masked_reference, assert_same_kept, interpreting
from traffic import OFF, Source

from uncomp.engine import conflicts

# The entropy kernels are loops over d = 64 steps, seconds for each head when they are interpreted:
# one test runs them, the others deal equally or by score.
SETTINGS = {"policy": "uniform", "keep": 0.34, "min_tokens": 64, "recompact_every": 32}
ARGUMENTS = interpreted.ARGUMENTS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")


@pytest.fixture(scope="module")
def model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return interpreted.short_model(demo_model, tmp_path_factory.mktemp("short"), 2)


def traffic(model: Path) -> list[Ask]:
    """Mixed batches: chunks of prompts beside decoding, twins that share blocks, opted out."""
    source = Source(model)
    prefix = source.take(128)
    return [
        Ask("short", source.take(20), tokens=3),
        Ask("long run", source.take(100), tokens=36),
        Ask("twin short", prefix[:100], tokens=4),
        Ask("twin long", prefix + source.take(40), tokens=4),
        Ask("two chunks", source.take(300), tokens=4),
        Ask("protected", source.take(150), extra={"kv_protect": "10:50"}, tokens=34),
        Ask("off", source.take(90), tokens=4, extra=OFF),
    ]


def test_dropping_answers_as_the_masked_reference(model: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "trace": str(tmp_path)}
    with interpreting(model, settings) as engine:
        report = engine.report()
        assert report["worker"] == "InterpretedWorker"
        assert report["backends"] == ["InterpretedImpl"]
        engine.llm.collective_rpc("warm_up_compression")  # must leave nothing behind
        # Two compactions of the long run, one of each of the four other long enough ones.
        assert_as_masked_reference(engine, model, traffic(model), least=6)
        after = engine.report()
        ran = after["decode_steps"] - report["decode_steps"]
        assert ran > 30
        assert after["decode_executions"] == [n + ran for n in report["decode_executions"]]


@pytest.mark.parametrize("settings", [{"relocate": True}, {"budget": 100_000, "keep": None}])
def test_nothing_dropped_answers_as_the_unmodified_engine(
    model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    asks = traffic(model)
    with running(model, None, **ARGUMENTS) as engine:
        stock = engine.serve(asks)
    given = {**SETTINGS, "trace": str(tmp_path), **settings}
    with interpreting(model, {k: v for k, v in given.items() if v is not None}) as engine:
        ours = engine.serve(asks)
        compactions = len(engine.trace())
        assert engine.leftovers() == {}
    assert (compactions > 4) == ("relocate" in settings)
    for name, [answer] in stock.items():
        assert ours[name][0].tokens == answer.tokens, name


@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX512"),
    reason="vLLM's CPU engine has FP8 caches with AVX-512 only",
)
def test_fp8_cache_is_moved_as_it_is(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes and scales: relocated entries are read as before, compacted ones are scored."""
    monkeypatch.setattr(conflicts, "_cache_dtypes", lambda config: ("fp8",))
    source = Source(model)
    asks = [Ask("a", source.take(120), tokens=36), Ask("b", source.take(200), tokens=4)]
    answers = {}
    modes: dict[str, dict[str, Any]] = {
        "as vLLM has it": {"keep": None, "budget": 100_000},
        "relocated": {"relocate": True},
        "compacted": {},
    }
    for mode, given in modes.items():
        settings = {**SETTINGS, "trace": str(tmp_path / mode), **given}
        settings = {name: value for name, value in settings.items() if value is not None}
        with interpreting(model, settings, kv_cache_dtype="fp8") as engine:
            assert engine.llm.llm_engine.vllm_config.cache_config.cache_dtype == "fp8"
            answers[mode] = engine.serve(asks)
            assert bool(engine.trace()) == (mode != "as vLLM has it")
            assert engine.leftovers() == {}
    for name, [answer] in answers["as vLLM has it"].items():
        [moved] = answers["relocated"][name]
        assert moved.tokens == answer.tokens
        for ours, theirs in zip(moved.logprobs, answer.logprobs, strict=True):
            assert ours == pytest.approx(theirs, abs=5e-4)
        # Before its first compaction a request is what it was.
        [compacted] = answers["compacted"][name]
        assert compacted.tokens[0] == answer.tokens[0]
        assert compacted.logprobs[-1] != pytest.approx(answer.logprobs[-1], abs=5e-4)


def test_other_policies(model: Path, tmp_path: Path) -> None:
    """Of one batch, each request under its own."""
    source = Source(model)
    long, short = source.take(120), source.take(200)
    asks = []
    for policy in ("adakv", "streaming", "random", "key_norm", "key_difference", "hybrid"):
        own = {"kv_policy": policy}
        asks.append(Ask(f"{policy} a", long, tokens=44, extra=own))
        asks.append(Ask(f"{policy} b", short, tokens=3, extra=own))
    settings = {**SETTINGS, "trace": str(tmp_path)}
    with interpreting(model, settings) as engine:
        assert_as_masked_reference(engine, model, asks, least=18)


def test_device_and_host_keep_the_same(model: Path, tmp_path: Path) -> None:
    """The two compactors decide alike, by entropy: kernels and PyTorch on the same traffic."""
    asks = [Ask("a", Source(model).take(230), tokens=36)]
    kept = {}
    for name, start in (("host", running), ("device", interpreting)):
        settings = {**SETTINGS, "policy": "entropy", "groups": 3, "trace": str(tmp_path / name)}
        with start(model, settings, **ARGUMENTS) as engine:
            engine.serve(asks)
            records = sorted(engine.trace(), key=lambda r: (r["num_tokens"], r["generation"]))
        assert len(records) == 2
        kept[name] = records
    assert_same_kept(kept["host"], kept["device"])
