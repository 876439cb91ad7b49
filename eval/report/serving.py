"""Results of ``uncomp bench serve`` as a report shows them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uncomp.config import UncompConfig
from uncomp.eval.report.inputs import Held, Throughput
from uncomp.eval.run.records import Case


def read_serving(paths: Sequence[Path]) -> tuple[list[Throughput], list[Held]]:
    """Speed over concurrency, and the cache held at the highest one, of every file.

    Args:
        paths: ``NAME.json`` of `uncomp bench serve`. Loads at a fixed concurrency only: an offered
            rate is no concurrency.

    Raises:
        ValueError: a file is something else, or two files measured the same case twice.
    """
    speeds: list[Throughput] = []
    held: list[Held] = []
    for path in paths:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            cases = {"full": Case("full"), "compressed": _case(found["settings"]["kv"])}
            rounds = max((s["round"] for s in found["held"]), default=1)
            fixed = [point for point in found["points"] if point["mode"] == "concurrency"]
            new = [_speed(point, cases[point["arm"]], rounds) for point in fixed]
            traces = _held(found["held"], cases, max((p["level"] for p in fixed), default=0))
        except (OSError, TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is no result of `uncomp bench serve` ({error!r}): give its NAME.json"
            ) from error
        known = {(speed.case, speed.concurrency) for speed in speeds}
        twice = [s for s in new if s.case.method != "full" and (s.case, s.concurrency) in known]
        if twice:
            raise ValueError(f"{path}: {twice[0].case} was measured in another file already")
        # The full cache is in every file; the first one is shown.
        speeds += [speed for speed in new if (speed.case, speed.concurrency) not in known]
        shown = {trace.case for trace in held}
        held += [trace for trace in traces if trace.case not in shown]
    return speeds, held


def _case(kv: Mapping[str, Any]) -> Case:
    """The compressed arm by its settings."""
    rest = [f"{name} {value}" for name, value in kv.items() if name not in ("keep", "policy")]
    policy = kv.get("policy", UncompConfig(keep=1.0).policy)
    return Case(", ".join([policy, *rest]), float(kv.get("keep") or 1.0))


def _speed(point: Mapping[str, Any], case: Case, rounds: int) -> Throughput:
    middle, low, high = point["metrics"]["output_throughput"]
    return Throughput(case, int(point["level"]), middle, low, high, rounds)


def _held(
    series: Sequence[Mapping[str, Any]], cases: Mapping[str, Case], level: float
) -> list[Held]:
    """Each arm's first round at a concurrency."""
    first = {
        s["arm"]: s for s in reversed(series) if (s["mode"], s["level"]) == ("concurrency", level)
    }
    return [
        Held(case, tuple(first[arm]["seconds"]), tuple(first[arm]["bytes"]))
        for arm, case in cases.items()
        if arm in first
    ]
