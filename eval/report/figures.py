"""Which plots a report has, and what is in them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import log2
from typing import Any

from uncomp.eval.report import plots
from uncomp.eval.report.analysis import Analysis, Result
from uncomp.eval.report.blocks import Picture
from uncomp.eval.report.cases import FULL, Group, Measure
from uncomp.eval.report.inputs import Held, Throughput
from uncomp.eval.report.plot_style import svg
from uncomp.eval.run.records import Case, Scored

# More different lengths or depths than this are put together.
MOST_LENGTHS, MOST_DEPTHS = 12, 11
BANDS = "Bands are 95 % bootstrap intervals over samples; the dashed line is the full cache."


def overall(analysis: Analysis) -> list[Picture]:
    """Score over measured keep ratio: the first group of accuracies."""
    groups = [group for group in analysis.groups if group.metric == "score" and group.higher]
    if not groups:
        return []
    group = groups[0]
    panel = _panel(group.name, group, analysis.macros)
    n = max(r.estimate.n for r in analysis.macros if r.of == group)
    caption = f"Mean over {len(group.measures)} tasks, n = {n} samples. {BANDS}" + _hollow([panel])
    drawing = plots.accuracy([panel], order=_methods(analysis))
    return [Picture("accuracy", f"Score over kept cache, {group.name}", caption, svg(drawing))]


def families(analysis: Analysis) -> list[Picture]:
    """Small multiples of single tasks: one picture per group of several, one for the others."""
    groups = [group for group in analysis.groups if group.name != "all tasks"]
    pictures = []
    for group in (group for group in groups if len(group.measures) > 1):
        title = f"{group.name}: {group.metric} of single tasks over kept cache"
        if not group.higher:
            title += " (lower is better)"
        stem = f"tasks-{group.name}" + ("" if group.metric == "score" else f"-{group.metric}")
        names = {measure: measure.task.removeprefix(f"{group.name}/") for measure in group.measures}
        pictures.append(_multiples(analysis, stem, title, names))
    alone = [group.measures[0] for group in groups if len(group.measures) == 1]
    if alone and len(groups) > 1:  # one group of one task is the first picture of the report
        names = {m: m.task if m.metric == "score" else f"{m.task}, {m.metric}" for m in alone}
        title = "Families with one task, and other metrics, over kept cache"
        pictures.append(_multiples(analysis, "tasks-alone", title, names))
    return pictures


def _multiples(analysis: Analysis, stem: str, title: str, names: Mapping[Measure, str]) -> Picture:
    panels = [_panel(name, measure, analysis.results) for measure, name in names.items()]
    counts = [r.estimate.n for r in analysis.results if r.of in names]
    caption = f"n = {_range(counts)} samples per task. {BANDS}" + _hollow(panels)
    drawing = plots.accuracy(panels, order=_methods(analysis))
    return Picture(_stem(stem), title, caption, svg(drawing))


def needles(scored: Sequence[Scored]) -> list[Picture]:
    """Heat maps of samples that say where their needle is, one picture per family and ratio."""
    found: dict[str, list[tuple[Scored, float, float]]] = defaultdict(list)
    for s in scored:
        depth = _depth(s)
        if depth is not None and s.higher_is_better:
            length = float(s.facts.get("length") or s.prompt_tokens)
            found[s.task.partition("/")[0]].append((s, length, depth))
    pictures = []
    for family, entries in found.items():
        keeps = sorted({s.case.keep for s, _, _ in entries if s.case != FULL}, reverse=True)
        for keep in keeps or [FULL.keep]:
            shown = [e for e in entries if e[0].case == FULL or e[0].case.keep == keep]
            heats = _heats(shown)
            counts = [count for heat in heats for _, count in heat.cells.values()]
            caption = (
                f"Mean score by length of the prompt and depth of the needle; "
                f"n = {_range(counts)} answers per cell, no intervals; empty: not asked."
            )
            title = f"{family}: needles at keep {keep:g}"
            name = _stem(f"needle-{family}-{keep:g}")
            pictures.append(Picture(name, title, caption, svg(plots.needle(heats))))
    return pictures


def pareto(analysis: Analysis, scored: Sequence[Scored], facts: Mapping[str, Any]) -> list[Picture]:
    """Score over kept bytes, or over the kept share where bytes per token are not known."""
    groups = [group for group in analysis.groups if group.metric == "score" and group.higher]
    if not groups:
        return []
    per_token = facts.get("kv_bytes_per_token")
    sizes = _sizes(scored, groups[0], float(per_token) if per_token else None)
    results = [r for r in analysis.macros if r.of == groups[0] and r.complete]
    trades = [
        plots.Trade(r.case.method, plots.case_name(r.case), sizes[r.case], r.estimate.mean)
        for r in results
        if sizes.get(r.case)
    ]
    if len(trades) < 2:
        return []
    caption = (
        f"{groups[0].name}: mean score of every case. Grey: another case scores at least as high "
        f"with no more cache (sizes within {100 * (plots.SAME - 1):.0f} % count as equal). "
        "Intervals are in the tables."
    )
    if per_token:
        caption += " Bytes: measured share times prompt tokens times bytes per token, mean."
    missing = len(analysis.cases) - len(trades)
    if missing:
        caption += f" {missing} cases are not shown: kept cache not measured, or tasks missing."
    drawing = plots.pareto(trades, in_bytes=bool(per_token), order=_methods(analysis))
    return [Picture("pareto", "Score against kept cache", caption, svg(drawing))]


def speed(
    analysis: Analysis, throughput: Sequence[Throughput], held: Sequence[Held]
) -> list[Picture]:
    """Throughput and cache held over time, where measured."""
    pictures = []
    if throughput:
        repeats = sorted({entry.repeats for entry in throughput})
        caption = (
            f"Median of {' or '.join(map(str, repeats))} measurements per point; bands: 20 % and "
            "80 % quantiles."
        )
        drawing = plots.throughput(throughput, order=_methods(analysis))
        title = "Throughput over concurrency"
        pictures.append(Picture("throughput", title, caption, svg(drawing)))
    if held:
        drawing = plots.held(held, order=_methods(analysis))
        caption = "Bytes of KV cache in use by running requests, as the engine reports them."
        pictures.append(Picture("held", "KV cache held over time", caption, svg(drawing)))
    return pictures


def _panel(title: str, of: Measure | Group, results: Sequence[Result]) -> plots.Panel:
    curves: dict[str, list[plots.Point]] = {}
    for r in results:
        if r.of != of or (isinstance(of, Group) and not r.complete):
            continue
        measured = r.kept.mean if r.kept.mean else None
        ends, mean = r.estimate.interval, r.estimate.mean
        point = plots.Point(
            measured or r.case.keep, mean, ends.low, ends.high, measured is not None
        )
        curves.setdefault(r.case.method, []).append(point)
    if of.higher:
        return plots.Panel(title, curves)
    return plots.Panel(title, curves, f"{of.metric} (lower is better)", 1.0)


def _hollow(panels: Sequence[plots.Panel]) -> str:
    unmeasured = any(
        not point.measured
        for panel in panels
        for method, points in panel.curves.items()
        for point in points
        if method != "full"
    )
    return " Hollow: kept ratio as asked, not measured." if unmeasured else ""


def _heats(entries: Sequence[tuple[Scored, float, float]]) -> list[plots.Heat]:
    many_lengths = len({length for _, length, _ in entries}) > MOST_LENGTHS
    many_depths = len({depth for _, _, depth in entries}) > MOST_DEPTHS
    cells: dict[Case, dict[tuple[float, float], list[float]]] = {}
    for s, length, depth in entries:
        x = 2.0 ** round(log2(length)) if many_lengths else length
        y = round(depth, 1) if many_depths else depth
        cells.setdefault(s.case, {}).setdefault((x, y), []).append(s.value)
    return [
        plots.Heat(case.method, {at: (sum(v) / len(v), len(v)) for at, v in found.items()})
        for case, found in sorted(cells.items(), key=lambda item: item[0] != FULL)
    ]


def _depth(s: Scored) -> float | None:
    """Depth of the needle in [0, 1]: of the sample, or of the turn if each has its own."""
    depth = s.facts.get("depth")
    depths = s.facts.get("depths")
    if depth is None and isinstance(depths, Sequence) and s.turn < len(depths):
        depth = depths[s.turn]
    if isinstance(depth, bool) or not isinstance(depth, int | float) or not 0 <= depth <= 1:
        return None
    return float(depth) if s.facts.get("length") or s.prompt_tokens else None


def _sizes(scored: Sequence[Scored], group: Group, per_token: float | None) -> dict[Case, float]:
    tasks = {measure.task for measure in group.measures}
    found: dict[Case, list[float]] = {}
    for s in scored:
        if s.task in tasks and s.keep_measured is not None:
            size = s.prompt_tokens * per_token if per_token else 1.0
            found.setdefault(s.case, []).append(s.keep_measured * size)
    return {case: sum(sizes) / len(sizes) for case, sizes in found.items()}


def _methods(analysis: Analysis) -> list[str]:
    return list(dict.fromkeys(case.method for case in analysis.cases))


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def _stem(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-_" else "-" for letter in text)
