"""The results of a serving comparison as rows, as a table, and as JSON for plots."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from uncomp.eval.bench.rows import Row, judge
from uncomp.eval.bench.serve_measure import METRICS
from uncomp.eval.bench.serve_plan import ARMS, Load
from uncomp.eval.bench.serve_records import LoadPoint, Measured

NAME = "serve"
#: metrics of which the compressed arm's is also given as a multiple of the full arm's
COMPARED = (
    "output_throughput",
    "total_throughput",
    "request_throughput",
    "ttft_p50",
    "ttft_p99",
    "tpot_p50",
    "tpot_p99",
    "itl_p99",
    "held_peak",
    "held_mean",
    "joules_per_token",
)


def rows(results: list[Measured], traffic: str, labels: dict[str, str]) -> list[Row]:
    """All numbers: medians over the rounds, and the compressed arm's over the full arm's.

    Args:
        traffic: what was sent, for the rows' setting.
        labels: arm -> how it served.
    """
    found: list[Row] = []
    for load in _loads(results):
        for arm in ARMS:
            rounds = _rounds(results, arm, load)
            for name, (title, unit) in METRICS.items():
                values = [r.metrics[name] for r in rounds if name in r.metrics]
                if values:
                    most = 0.0 if name in ("failed", "other_length") else None
                    setting = f"{traffic}, {load}, {labels[arm]}"
                    found.append(judge(NAME, setting, title, unit, values, most=most))
        for name in COMPARED:
            ratios = _ratios(results, load, name)
            if ratios:
                setting = f"{traffic}, {load}, {labels['compressed']} over {labels['full']}"
                found.append(judge(NAME, setting, METRICS[name][0], "x", ratios))
    return found


def points(results: list[Measured]) -> list[LoadPoint]:
    """Every arm under every load."""
    found = []
    for load in _loads(results):
        for arm in ARMS:
            rounds = _rounds(results, arm, load)
            metrics = {}
            for name in METRICS:
                values = [r.metrics[name] for r in rounds if name in r.metrics]
                if values:
                    row = judge(NAME, "", name, "", values)
                    metrics[name] = (row.value, row.low, row.high)
            if metrics:
                found.append(LoadPoint(arm, load.mode, load.level, metrics))
    return found


def table(results: list[Measured], labels: dict[str, str]) -> str:
    """A Markdown table: one row per load and metric, both arms beside each other."""
    full, compressed = labels["full"], labels["compressed"]
    lines = [
        f"| load | metric | {full} | {compressed} | ratio |",
        "|---|---|---:|---:|---:|",
    ]
    arms = {(p.arm, p.mode, p.level): p.metrics for p in points(results)}
    for load in _loads(results):
        columns = [arms.get((arm, load.mode, load.level), {}) for arm in ARMS]
        for name, (title, unit) in METRICS.items():
            if not any(name in column for column in columns):
                continue
            cells = [_cell(column.get(name), unit) for column in columns]
            ratios = _ratios(results, load, name) if name in COMPARED else []
            ratio = _cell(_middle(ratios), "x") if ratios else ""
            lines.append(f"| {load} | {title} | {cells[0]} | {cells[1]} | {ratio} |")
    return "\n".join(lines)


def as_json(
    results: list[Measured], settings: dict[str, Any], facts: dict[str, str]
) -> dict[str, Any]:
    """Everything a plot needs: see :mod:`uncomp.eval.bench.serve_records`."""
    held = [series for r in results if (series := r.held()) is not None]
    return {
        "settings": settings,
        "facts": facts,
        "points": [dataclasses.asdict(point) for point in points(results)],
        "held": [dataclasses.asdict(series) for series in held],
    }


def facts(results: Iterable[Measured]) -> dict[str, str]:
    """Facts of all results; where they differ (resumed on another day) all values are named."""
    merged: dict[str, dict[str, None]] = {}
    for result in results:
        for name, value in result.facts.items():
            merged.setdefault(name, {})[value] = None
    return {name: " + ".join(values) for name, values in merged.items()}


def _loads(results: list[Measured]) -> list[Load]:
    return list(dict.fromkeys(Load(r.mode, r.level) for r in results))


def _rounds(results: list[Measured], arm: str, load: Load) -> list[Measured]:
    return [r for r in results if (r.arm, r.mode, r.level) == (arm, load.mode, load.level)]


def _ratios(results: list[Measured], load: Load, name: str) -> list[float]:
    """Compressed over full, round by round."""
    full, compressed = (
        {r.round: r.metrics[name] for r in _rounds(results, arm, load) if name in r.metrics}
        for arm in ARMS
    )
    return [compressed[n] / full[n] for n in full if n in compressed and full[n] > 0]


def _middle(values: list[float]) -> tuple[float, float, float]:
    row = judge(NAME, "", "", "", values)
    return row.value, row.low, row.high


def _cell(values: tuple[float, float, float] | None, unit: str) -> str:
    if values is None:
        return "-"
    middle, low, high = (_shown(value) for value in values)
    spread = f" ({low} to {high})" if low != high else ""
    return f"{middle} {unit}".rstrip() + spread


def _shown(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
