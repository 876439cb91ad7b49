"""The same request keeps the same tokens whatever runs beside it and however it is chunked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Ask, Engine, running
from torch import Tensor
from traffic import Source

from uncomp.engine import compactor as compactor_module

CHUNKS = (4096, 512, 128)
SETTINGS = {"keep": 0.25, "min_tokens": 64, "policy": "entropy"}
SITUATIONS = (
    *(f"chunks of {chunk}" for chunk in CHUNKS[1:]),
    "among others",
    "among others, chunks of 512",
)

# Attention and matrix products sum in another order for another chunk. That moves a score by a
# factor of up to 1 + 3e-5 in float32; by 1.3 in bfloat16, whose keys and queries have 8 bits: a
# logit of 30 is off by up to 0.1, and the error of 30 layers adds to it.
SCORE_RATIO = {"float32": 1.001, "bfloat16": 1.5}
ENTROPY_DISTANCE = {"float32": 1e-6, "bfloat16": 1e-3}
#: share of the kept entries that may be others
EXCHANGED = {"float32": 0.001, "bfloat16": 0.03}


@dataclass
class Choice:
    """One compaction of one request: per layer scores [H, N], and the entries kept per head.

    Attributes:
        entropy: [layers, H] that the shares were dealt by.
    """

    pooled: list[Tensor] = field(default_factory=list)
    kept: list[list[set[int]]] = field(default_factory=list)
    entropy: Tensor = field(default_factory=lambda: torch.zeros(0))


@contextmanager
def _recorded(engine: Engine) -> Iterator[dict[str, Choice]]:
    """Request id -> its first compaction, as it happens in the worker (in this process)."""
    found: dict[str, Choice] = {}
    current: list[Choice] = []
    worker = engine.core.model_executor.driver_worker.worker
    compactor = worker._seat.compactors.default
    run, top_entries = compactor.run, compactor_module.top_entries

    def recording_run(order: Any, *args: Any) -> Any:
        current[:] = [Choice()]
        receipt = run(order, *args)
        if order.generation == 1:
            current[0].entropy = compactor.requests.slots[order.request_id].entropy
            found[order.request_id] = current[0]
        return receipt

    def recording_top(pooled: Tensor, *args: Any) -> Tensor:
        chosen = top_entries(pooled, *args)  # [layers of a group * heads, K]
        layers = (-1, compactor.heads)
        current[0].pooled += pooled.clone().unflatten(0, layers)
        for layer in chosen.unflatten(0, layers):
            current[0].kept.append([set(row[row >= 0].tolist()) for row in layer])
        return chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compactor, "run", recording_run)
        patch.setattr(compactor_module, "top_entries", recording_top)
        yield found


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def choices(
    request: pytest.FixtureRequest, demo_model: Path
) -> tuple[str, dict[str, dict[str, Choice]]]:
    """(dtype, situation -> prompt -> what was chosen)."""
    if request.param == "bfloat16":
        request.getfixturevalue("bfloat16_at_length")
    source = Source(demo_model)
    asks = [Ask(f"{n} tokens", source.take(n), tokens=2) for n in (250, 1200)]
    others = [Ask(f"other {i}", source.take(30 + 25 * i), tokens=12) for i in range(16)]
    arguments = {"max_num_batched_tokens": max(CHUNKS), "kv_cache_memory_bytes": 500_000_000}
    found: dict[str, dict[str, Choice]] = {}
    with running(demo_model, SETTINGS, dtype=request.param, **arguments) as engine:
        for chunk in CHUNKS:
            with engine.chunks_of(chunk):
                found[f"chunks of {chunk}"] = _choices(engine, asks, [])
        found["again"] = _choices(engine, asks, [])
        found["among others"] = _choices(engine, asks, others)
        with engine.chunks_of(512):
            found["among others, chunks of 512"] = _choices(engine, asks, others)
    return request.param, found


def _choices(engine: Engine, asks: list[Ask], others: list[Ask]) -> dict[str, Choice]:
    found = {}
    for ask in asks:
        engine.forget()
        with _recorded(engine) as recorded:
            [answer] = engine.serve([*others[:8], ask, *others[8:]])[ask.name]
        found[ask.name] = recorded[answer.request_id]
    return found


@pytest.mark.parametrize("situation", SITUATIONS)
def test_differs_only_where_scores_are_equal(
    choices: tuple[str, dict[str, dict[str, Choice]]], situation: str
) -> None:
    """Entries kept in one run only score the same, within rounding, as those they replace."""
    dtype, found = choices
    exchanged = total = 0
    for name, first in found[f"chunks of {CHUNKS[0]}"].items():
        second = found[situation][name]
        for layer, (ours, theirs) in enumerate(zip(first.kept, second.kept, strict=True)):
            entropies = first.entropy[layer], second.entropy[layer]
            torch.testing.assert_close(*entropies, rtol=0, atol=ENTROPY_DISTANCE[dtype])
            if [len(kept) for kept in ours] != [len(kept) for kept in theirs]:
                gaps = entropies[0].sort().values.diff()
                assert gaps.min() < 2 * ENTROPY_DISTANCE[dtype], (name, layer)
                continue
            for head, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                total += len(a)
                exchanged += len(a - b)
                if a != b:
                    scores = first.pooled[layer][head]
                    gone, come = (scores[torch.tensor(sorted(s))] for s in (a - b, b - a))
                    assert gone.max() < come.min() * SCORE_RATIO[dtype], (name, layer, head)
    print(f"{dtype}, {situation}: {exchanged} of {total} kept entries are others")
    assert exchanged <= EXCHANGED[dtype] * total


def test_repeats_exactly(choices: tuple[str, dict[str, dict[str, Choice]]]) -> None:
    """The same batch again keeps the same tokens, to the last one."""
    _, found = choices
    for name, first in found[f"chunks of {CHUNKS[0]}"].items():
        assert len(first.kept) == len(first.entropy)
        assert found["again"][name].kept == first.kept
