"""Drift: stretches of an answer, and which cases are compared."""

from __future__ import annotations

import json

import pytest

from uncomp.config import UncompConfig
from uncomp.eval.ablation.drift import cases, rows, stretches
from uncomp.eval.engines.base import Answer
from uncomp.eval.tasks.teacher_forcing import TokenRecord, scored_values
from uncomp.request import request_settings


def record(forced: float) -> TokenRecord:
    return TokenRecord(forced, (1, 2), (forced, -3.0))


def answer(key: str, *forced: float, keep: float = 1.0) -> Answer:
    records = tuple(map(record, forced))
    return Answer(key, "", len(forced), "length", 1.0, {"keep": keep}, records)


def test_a_row_a_stretch() -> None:
    full = (-0.1, -0.2, -0.3, -0.4, -0.5)
    other = (-0.1, -0.2, -0.6, -0.9, -9.0)
    answers = [answer("a/full", *full), answer("a/x", *other, keep=0.5)]
    answers += [answer("b/full", *full), answer("b/x", *full, keep=0.25)]
    first, second = rows({a.key: a for a in answers}, 2)
    assert (first["case"], first["tokens"], first["prompts"]) == ("x", 2, 2)
    assert first["kl"] == first["nll_increase"] == 0
    assert second["tokens"] == 4
    assert second["nll_increase"] == pytest.approx((0.3 + 0.5) / 2 / 2)  # the rest is left out
    assert second["kept"] == 0.375
    records = [tuple(map(record, values)) for values in (full, other)]
    assert stretches(*records, 2)[1] == scored_values(records[0][2:4], records[1][2:4])


def test_a_server_takes_every_case() -> None:
    server = UncompConfig(keep=1.0, shares="calibrated", calibration="file")
    found = cases(0.25, 512, calibrated=True)
    assert len(found) == 1 + 2 * 2 * 4
    for name, extra in found.items():
        settings = request_settings(extra, server, 1024)
        assert settings.compress == (name != "full")
        if name != "full":
            own = settings.own or server  # None: as the server's
            every = json.loads(extra["kv_settings"])["recompact_every"]
            assert (own.shares, own.recompact_every) == (name.split()[0], every)
    assert all("calibrated" not in name for name in cases(0.25, 512, calibrated=False))
