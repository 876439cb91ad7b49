"""Layers that share one budget on the path of a GPU, its kernels interpreted: see `interpreted.py`.

Their entries lie in other layers' caches; a first compaction goes from layer to layer inside the
request's blocks, a later one writes to fresh ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import interpreted
import pytest
import torch
from harness import Ask, running
from interpreted import ARGUMENTS, assert_as_masked_reference, assert_same_kept, interpreting
from traffic import OFF, Source
from unequal import unequal_calibration

LAYERS = 3
SETTINGS: dict[str, Any] = {
    **{"policy": "uniform", "keep": 0.34, "min_tokens": 64, "recompact_every": 32},
    **{"window": 16, "recent": 8, "floor": 0.1},
}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")


@pytest.fixture(autouse=True)
def _memory_for_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one layer writes must not be what the next one has to read."""
    monkeypatch.setattr(interpreted, "ARENA_BYTES", 500_000)


@pytest.fixture(scope="module")
def model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return interpreted.short_model(demo_model, tmp_path_factory.mktemp("short"), LAYERS)


@pytest.fixture(scope="module")
def settings(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Heads that need anything between nothing and all."""
    file = tmp_path_factory.mktemp("calibration") / "unequal.json"
    unequal_calibration(model).save(file)
    return {**SETTINGS, "shares": "calibrated", "calibration": str(file)}


def test_answers_as_the_masked_reference(
    model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Mixed batches; twins share blocks; one request shares as in PyramidKV, one not at all."""
    source = Source(model)
    prefix = source.take(128)
    asks = [
        Ask("short", source.take(20), tokens=3),
        Ask("long run", source.take(230), tokens=30),
        Ask("twin short", prefix, tokens=4),
        Ask(
            "twin long",
            prefix + source.take(110),
            extra={"kv_protect": "10:50", "kv_settings": {"shares": "pyramid"}},
            tokens=4,
        ),
        Ask("alone", source.take(230), extra={"kv_settings": {"shares": "policy"}}, tokens=30),
        Ask("dense", source.take(230), extra={"kv_policy": "key_norm"}, tokens=30),
        Ask("off", source.take(90), tokens=4, extra=OFF),
    ]
    with interpreting(model, {**settings, "trace": str(tmp_path)}) as engine:
        assert_as_masked_reference(engine, model, asks, least=8)
        assert_unequal(engine.trace())


def assert_unequal(records: list[dict[str, Any]]) -> None:
    """A layer keeps more than its share in some of these, so that it has to look elsewhere."""
    totals = [[sum(map(len, layer)) for layer in record["kept"]] for record in records]
    assert any(max(row) * len(row) > sum(row) for row in totals), totals


def test_preempted_requests(model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Too few blocks for all: some start over, and later compactions wait for free ones."""
    source = Source(model)
    asks = [
        Ask("a", source.take(230), tokens=30),
        Ask("b", source.take(230), tokens=30),
        Ask("off", source.take(90), tokens=50, extra=OFF),
    ]
    with interpreting(model, {**settings, "trace": str(tmp_path)}) as engine:
        assert_as_masked_reference(engine, model, asks, least=4, pool=13)
        assert engine.metric("num_preemptions") > 0
        assert_unequal(engine.trace())


def test_device_and_host_keep_the_same(
    model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    asks = [Ask("a", Source(model).take(230), tokens=30)]
    kept = {}
    for name, start in (("host", running), ("device", interpreting)):
        given = {**settings, "trace": str(tmp_path / name)}
        with start(model, given, **ARGUMENTS) as engine:
            engine.serve(asks)
            records = sorted(engine.trace(), key=lambda r: (r["num_tokens"], r["generation"]))
        assert len(records) == 2
        assert_unequal(records)
        kept[name] = records
    assert_same_kept(kept["host"], kept["device"])
