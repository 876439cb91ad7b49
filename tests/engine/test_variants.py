"""Engines set up in other ways: each answers as the masked reference and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Ask, running
from reference import Reference
from traffic import OFF, Source

SETTINGS = {"keep": 0.25, "min_tokens": 64, "recompact_every": 32}
#: pruned steps run the model without its graph, the others in it
PRUNING = {"prefill_keep": 1.0, "prefill_stages": "3,9,17,25", "prefill_floor": 96}


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ({"enforce_eager": False, "max_num_batched_tokens": 1024}, PRUNING),
        ({"block_size": 64}, {}),
        ({"block_size": 128}, {}),
        ({"enable_prefix_caching": False}, {}),
        ({"scheduling_policy": "priority"}, {"budget": 96, "keep": None, "window": 24}),
        ({}, {"window": 1, "sinks": 0, "pooling": 1, "pooling_kind": "max", "reduce": "max"}),
    ],
    ids=["compiled", "blocks of 64", "blocks of 128", "no prefix cache", "budget", "least window"],
)
def test_answers_as_masked_reference(
    demo_model: Path, tmp_path: Path, arguments: dict[str, Any], settings: dict[str, Any]
) -> None:
    source = Source(demo_model)
    asks = [Ask(f"{n} tokens", source.take(n), tokens=40) for n in (40, 300, 450)]
    asks += [
        Ask("one more token", (*asks[2].prompt, 7), tokens=8),
        Ask("off", source.take(150), tokens=20, extra=OFF),
    ]
    if settings is PRUNING:
        asks.append(Ask("pruned", source.take(330), tokens=8, extra={"kv_prefill_keep": 0.5}))
    given = {**SETTINGS, **settings, "trace": str(tmp_path)}
    given = {name: value for name, value in given.items() if value is not None}
    with running(demo_model, given, dtype="float32", max_model_len=1024, **arguments) as engine:
        answers = engine.serve(asks)
        traces = {name: engine.trace(group[0].request_id) for name, group in answers.items()}
        pruned = {name: engine.pruned(group[0].request_id) for name, group in answers.items()}
        assert engine.leftovers() == {}
    assert [name for name in pruned if pruned[name]] == ["pruned"] * (settings is PRUNING)
    assert sum(bool(trace) for trace in traces.values()) >= 3
    reference = Reference(demo_model, torch.float32)
    for name, [answer] in answers.items():
        expected = reference.logprobs(answer.prompt, answer.tokens, traces[name], pruned[name])
        for row, step in zip(expected, answer.logprobs, strict=True):
            for token, logprob in step.items():
                assert logprob == pytest.approx(float(row[token]), abs=5e-4), name
