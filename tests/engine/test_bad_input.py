"""Bad settings and odd requests: a clear error at the right moment, or correct service."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Ask, Engine, running
from traffic import Source

from uncomp.calibration.collect import calibrate, load_model
from uncomp.calibration.text import default_texts

LIMIT = 512


def _configure(model: Path, settings: Any, **arguments: Any) -> Any:
    """What `LLM` and `vllm serve` do first: the engine's configuration, without the engine."""
    from vllm.engine.arg_utils import EngineArgs

    given = {"max_model_len": LIMIT, "additional_config": {"uncomp": settings}, **arguments}
    return EngineArgs(model=str(model), **given).create_engine_config()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"keep": 0}, r"keep=0.*\(0, 1\]"),
        ({"keep": 1.5}, r"keep=1.5.*\(0, 1\]"),
        ({"keep": -0.25}, r"keep=-0.25.*\(0, 1\]"),
        ({"keep": float("nan")}, r"keep=nan.*\(0, 1\]"),
        ({"keep": "0.25"}, "keep='0.25'.*float"),
        ({"keep": True}, "keep=True.*float"),
        ({}, "exactly one of keep .* and budget"),
        ({"keep": 0.5, "budget": 512}, "exactly one of keep .* and budget"),
        ({"budget": 35}, "budget=35: must be at least 36.*recent"),
        ({"budget": 100, "window": 97}, "budget=100: must be at least 101.*recent"),
        ({"keep": 0.25, "policy": "entropyy"}, "policy='entropyy'.*entropy.*uniform"),
        ({"keep": 0.25, "pooling": 4, "pooling_kind": "max"}, "pooling=4: must be odd"),
        ({"keep": 0.25, "pooling": 4096}, "pooling=4096: must be between 1 and 1024"),
        ({"keep": 0.25, "window": 0}, "window=0: must be between 1"),
        ({"keep": 0.25, "recompact_every": -1}, "recompact_every=-1: must be at least 0"),
        ({"keep": 0.25, "ratios": 2.0}, r"unknown uncomp setting \['ratios'\].*'ratio'"),
        (
            {"keep": 0.25, "policy": "entropy", "source": "queries"},
            "needs a calibration file.*uncomp calibrate",
        ),
        ({"keep": 0.25, "policy": "uncomp-v2"}, "needs a calibration file.*uncomp calibrate"),
        (0.25, 'must be an object like {"keep": 0.25}'),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value),
)
def test_wrong_settings_stop_the_start(demo_model: Path, settings: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        _configure(demo_model, settings)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding.*drop --speculative-config",
        ),
        (
            {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
            "a custom scheduler class.*drop --scheduler-cls",
        ),
        (
            {"worker_cls": "vllm.v1.worker.gpu_worker.Worker"},
            "a custom worker class.*drop --worker-cls",
        ),
        ({"kv_cache_dtype": "fp8_e5m2"}, "a quantised KV cache.*set --kv-cache-dtype auto"),
        (
            {
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {"shared_storage_path": "unused"},
                }
            },
            "a KV connector.*drop --kv-transfer-config",
        ),
        (
            {"kv_sharing_fast_prefill": True},
            "KV sharing fast prefill.*drop --kv-sharing-fast-prefill",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_conflicts_stop_the_start(demo_model: Path, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){says}.*UNCOMP_DISABLE=1"):
        _configure(demo_model, {"keep": 0.25}, **arguments)


def test_all_conflicts_are_named_at_once(demo_model: Path) -> None:
    arguments = {
        "scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler",
        "worker_cls": "vllm.v1.worker.gpu_worker.Worker",
    }
    with pytest.raises(ValueError, match=r"(?s)custom worker class.*custom scheduler class"):
        _configure(demo_model, {"keep": 0.25}, **arguments)


def test_switched_off_by_the_environment(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kill switch wins over settings that would be refused."""
    monkeypatch.setenv("UNCOMP_DISABLE", "1")
    scheduler = "vllm.v1.core.sched.scheduler.Scheduler"
    config = _configure(demo_model, {"keep": 7}, scheduler_cls=scheduler)
    assert config.scheduler_config.scheduler_cls == scheduler
    assert "uncomp" not in config.parallel_config.worker_cls


@pytest.fixture(scope="module")
def calibration(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tokenizer = load_model(str(demo_model), "cpu")
    made = calibrate(model, tokenizer, str(demo_model), default_texts(), samples=1, tokens=64)
    file = tmp_path_factory.mktemp("calibration") / "right.json"
    made.save(file)
    return file


def _edited(change: Callable[[dict[str, Any]], None]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return edit


def _other_model(text: str) -> str:
    from uncomp.calibration.file import identity_hash

    content = json.loads(text)
    content["identity"]["vocab_size"] = 32000
    content["config_hash"] = identity_hash(content["identity"])
    return json.dumps(content)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda text: text[: len(text) // 2], "not.*JSON|JSON"),
        (lambda text: "", "JSON"),
        (_edited(lambda c: c.pop("entropy")), "entropy"),
        (_edited(lambda c: c.update(format_version=99)), "version"),
        (_edited(lambda c: c["entropy"]["keys"]["full"]["mean"].pop()), "keys.*full|shape"),
        (_other_model, "model"),
    ],
    ids=["cut off", "empty", "no entropies", "future version", "a layer short", "another model"],
)
def test_bad_calibration_file_stops_the_start(
    demo_model: Path, calibration: Path, tmp_path: Path, edit: Callable[[str], str], says: str
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(edit(calibration.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError, match=says) as caught:
        _configure(demo_model, {"keep": 0.25, "policy": "entropy", "calibration": str(bad)})
    assert str(bad) in str(caught.value) or "model" in str(caught.value)


def test_missing_calibration_file_stops_the_start(demo_model: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.json")
    with pytest.raises(ValueError, match=r"missing\.json"):
        _configure(demo_model, {"keep": 0.25, "policy": "entropy", "calibration": missing})


def test_calibration_with_another_truncation_stops_the_start(
    demo_model: Path, calibration: Path
) -> None:
    with pytest.raises(ValueError, match=r"truncated at 16.*truncation=8"):
        _configure(
            demo_model,
            {"keep": 0.25, "policy": "entropy", "calibration": str(calibration), "truncation": 8},
        )


@pytest.fixture(scope="module")
def engine(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Small blocks' worth of everything is compressed: the least length is one token."""
    settings = {
        "keep": 0.25,
        "window": 8,
        "min_tokens": 1,
        "recompact_every": 32,
        "min_keep": 0.02,
        "trace": str(tmp_path_factory.mktemp("trace")),
    }
    with running(demo_model, settings, dtype="float32", max_model_len=LIMIT) as engine:
        yield engine


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"kv_keep": 0}, r"kv_keep=0: must be a number in \(0, 1\]"),
        ({"kv_keep": 2}, r"kv_keep=2: must be a number in \(0, 1\]"),
        ({"kv_keep": "much"}, r"kv_keep='much': must be a number in \(0, 1\]"),
        ({"kv_keep": 0.01}, "keeps 0.010 .* allows 0.02 and more"),
        ({"kv_keep": 0.5, "kv_budget": 64}, "kv_keep or kv_budget, not both"),
        ({"kv_budget": 11}, "kv_budget=11: .* at least 12"),
        ({"kv_budget": 12.5}, "kv_budget=12.5: must be a whole number"),
        ({"kv_compress": "maybe"}, "kv_compress='maybe': must be true or false"),
        ({"kv_protect": "first"}, "kv_protect='first': must be slices"),
        ({"kv_ratio": 0.5}, r"unknown setting \['kv_ratio'\]; allowed"),
    ],
    ids=lambda value: "" if isinstance(value, str) else json.dumps(value),
)
def test_bad_request_is_refused_and_the_engine_lives(
    engine: Engine, extra: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        engine.serve([Ask("bad", tuple(range(100, 200)), extra=extra)])
    [answer] = engine.serve([Ask("good", tuple(range(100, 200)), tokens=3)])["good"]
    assert len(answer.tokens) == 3


@pytest.mark.parametrize(
    ("prompt", "tokens", "extra"),
    [
        (1, 1, {}),
        (1, 70, {}),
        (3, 40, {}),
        (7, 40, {}),
        (8, 40, {}),
        (9, 40, {}),
        (12, 40, {"kv_budget": 12}),
        (31, 3, {}),
        (32, 3, {}),
        (33, 3, {}),
        (LIMIT - 1, 1, {}),
        (LIMIT - 12, 12, {}),
        (LIMIT - 40, 40, {"kv_budget": 12}),
        (100, 40, {"kv_budget": 12}),
        (200, 8, {"kv_protect": ":"}),
        (200, 40, {"kv_protect": "500:600"}),
        (200, 40, {"kv_protect": "-10:,:10,150:152", "kv_budget": 12}),
        (200, 8, {"kv_keep": 1.0}),
    ],
    ids=lambda value: json.dumps(value),
)
def test_odd_requests_are_served(
    engine: Engine, demo_model: Path, prompt: int, tokens: int, extra: dict[str, Any]
) -> None:
    """At the edges of every limit: answers as the masked reference, nothing left behind."""
    ask = Ask("odd", Source(demo_model).take(prompt), tokens=tokens, extra=extra)
    [answer] = engine.serve([ask])["odd"]
    assert len(answer.tokens) == tokens
    reference = _reference(demo_model)
    trace = engine.trace(answer.request_id)
    expected = reference.logprobs(answer.prompt, answer.tokens, trace)
    for row, step in zip(expected, answer.logprobs, strict=True):
        for token, logprob in step.items():
            assert logprob == pytest.approx(float(row[token]), abs=5e-4)
    assert engine.leftovers() == {}


_references: dict[Path, Any] = {}


def _reference(model: Path) -> Any:
    import torch
    from reference import Reference

    if model not in _references:
        _references[model] = Reference(model, torch.float32)
    return _references[model]


def test_too_long_prompt_is_refused_by_vllm_as_ever(engine: Engine) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="longer than the maximum model length"):
        engine.serve([Ask("long", tuple(range(100, 100 + LIMIT)))])
    with pytest.raises(VLLMValidationError, match="empty"):
        engine.serve([Ask("empty", ())])
    assert engine.leftovers() == {}


def test_unicode_prompts_and_answers(engine: Engine) -> None:
    """Text prompts of several scripts and emoji, through vLLM's own tokenisation."""
    from vllm import SamplingParams

    texts = ["Übergrößenträger " * 30, "東京は日本の首都です。" * 20, "🦜🪶 \u202e\u0000 ok" * 25]
    outputs = engine.llm.generate(texts, SamplingParams(temperature=0, max_tokens=8))
    assert [len(output.outputs) for output in outputs] == [1, 1, 1]
    assert engine.leftovers() == {}


def test_budget_smaller_than_what_always_stays(demo_model: Path) -> None:
    """A keep ratio may ask for less than window and sinks: then these are what is kept."""
    from uncomp.config import UncompConfig
    from uncomp.plan import Target
    from uncomp.request import request_settings

    config = UncompConfig(keep=0.01, window=60, sinks=40)
    target = Target.of(request_settings(None, config, 512), config, 32)
    assert target.kept_blocks(512) == 4
    with pytest.raises(ValueError, match="budget=99: must be at least 100"):
        dataclasses.replace(config, keep=None, budget=99)
