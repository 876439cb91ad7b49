"""The plots of a report. Inputs are plain values, results are figures of matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from uncomp.eval.report.inputs import Held, Throughput
from uncomp.eval.report.plot_style import (
    GRID,
    INK,
    MUTED,
    Style,
    case_styles,
    dress,
    figure,
    legend,
    styles,
)
from uncomp.eval.run.records import Case

SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
# Methods asked for the same ratio keep a little more or less; that is no better memory.
SAME = 1.03
UNITS = ((1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB"), (1, "bytes"))


@dataclass(frozen=True)
class Point:
    """A score at a keep ratio.

    Attributes:
        keep: share of the cache kept; score: mean; low, high: interval, None if there is none.
        measured: whether ``keep`` was measured or is what was asked for.
    """

    keep: float
    score: float
    low: float | None = None
    high: float | None = None
    measured: bool = True


@dataclass(frozen=True)
class Panel:
    """Curves in one pair of axes: method -> points. title: above it. label: of the score."""

    title: str
    curves: Mapping[str, Sequence[Point]]
    label: str = "score (0 to 100)"
    scale: float = 100.0


@dataclass(frozen=True)
class Heat:
    """One heat map: (length in tokens, depth in [0, 1]) -> (mean score in [0, 1], samples)."""

    title: str
    cells: Mapping[tuple[float, float], tuple[float, int]]


@dataclass(frozen=True)
class Trade:
    """A case in the plane of memory and score. size: bytes or share of the full cache."""

    method: str
    name: str
    size: float
    score: float


def accuracy(panels: Sequence[Panel], columns: int = 3, order: Sequence[str] = ()) -> Any:
    """Score over keep ratio per method, one panel or small multiples; bands are 95 % intervals.

    Args:
        panels: at least one, each with at least one point.
        columns: at most so many panels side by side.
        order: methods of the whole report, so that a method looks the same in all its plots.
    """
    known = styles([*order, *(method for panel in panels for method in panel.curves)])
    used = [m for m in known if any(m in panel.curves for panel in panels)]
    columns = min(columns, len(panels))
    lines = ceil(len(panels) / columns)
    width, height = (7.6, 4.2) if len(panels) == 1 else (9.6, 2.35 * lines)
    strip = 0.3 * ceil(len(used) / 4)
    drawing = figure(width, height + strip)
    grid = drawing.subplots(lines, columns, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index >= len(panels):
            axes.set_visible(False)
            continue
        panel = panels[index]
        new = index % columns == 0 or panel.label != panels[index - 1].label
        x = "KV cache kept (measured, log scale)" if len(panels) == 1 else "KV cache kept (log)"
        lowest = index + columns >= len(panels)
        dress(axes, x if lowest else "", panel.label if new else "", panel.title)
        for method, points in panel.curves.items():
            _curve(axes, points, known[method], panel.scale, method == "full")
        _shares(axes, [p.keep for points in panel.curves.values() for p in points])
    legend(drawing, [_handle(method, known[method]) for method in used])
    return drawing


def needle(heats: Sequence[Heat], columns: int = 4) -> Any:
    """Score by length and depth of the needle, one heat map per case, one colour scale."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    lengths = sorted({length for heat in heats for length, _ in heat.cells})
    depths = sorted({depth for heat in heats for _, depth in heat.cells})
    columns = min(columns, len(heats))
    lines = ceil(len(heats) / columns)
    wide = min(max(1.7, 0.42 * len(lengths) + 0.5), 4.0)
    tall = min(max(1.5, 0.3 * len(depths) + 0.6), 3.6)
    drawing = figure(max(5.0, 1.3 + wide * columns), 0.4 + tall * lines)
    grid = drawing.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    colours, norm = colormaps["cividis"].with_extremes(bad="none"), Normalize(0, 100)
    mesh = None
    for index, axes in enumerate(grid.flat):
        if index >= len(heats):
            axes.set_visible(False)
            continue
        mesh = _heat(axes, heats[index], lengths, depths, colours, norm)
        lowest, first = index + columns >= len(heats), index % columns == 0
        axes.set_xlabel("length (tokens)" if lowest else "", fontsize=8.5, color=INK)
        axes.set_ylabel("depth (%)" if first else "", fontsize=8.5, color=INK)
        axes.tick_params(labelbottom=lowest)
    bar = drawing.colorbar(mesh, ax=grid, pad=0.015, aspect=24, fraction=0.03)
    bar.set_label("score (0 to 100)", fontsize=8.5, color=INK)
    bar.ax.tick_params(labelsize=8, colors=MUTED)
    bar.outline.set_visible(False)
    return drawing


def throughput(measured: Sequence[Throughput], order: Sequence[str] = ()) -> Any:
    """Tokens per second over requests in flight, one line per case; bands are the spread."""
    cases = list(dict.fromkeys(entry.case for entry in measured))
    known = case_styles(cases, order)
    drawing = figure(7.6, 4.2 + 0.3 * ceil(len(cases) / 3))
    axes = drawing.subplots()
    dress(axes, "requests in flight", "generated tokens/s, all requests")
    for case in cases:
        entries = sorted((e for e in measured if e.case == case), key=lambda e: e.concurrency)
        style, at = known[case], [e.concurrency for e in entries]
        _line(axes, at, [e.tokens_per_second for e in entries], style)
        low = [e.tokens_per_second if e.low is None else e.low for e in entries]
        high = [e.tokens_per_second if e.high is None else e.high for e in entries]
        axes.fill_between(at, low, high, color=style.colour, alpha=0.15, linewidth=0)
    ticks = sorted({entry.concurrency for entry in measured})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.set_ylim(bottom=0)
    legend(drawing, [_handle(case_name(case), known[case]) for case in cases], 3)
    return drawing


def pareto(trades: Sequence[Trade], in_bytes: bool = False, order: Sequence[str] = ()) -> Any:
    """Score over kept cache; cases that another one beats in both are grey.

    Args:
        trades: one per case; at least one.
        in_bytes: whether sizes are bytes; else shares of the full cache.
        order: methods of the whole report.
    """
    known = styles([*order, *(trade.method for trade in trades)])
    factor, unit = _unit(max(t.size for t in trades)) if in_bytes else (1, "")
    best = front(trades)
    used = list(dict.fromkeys(trade.method for trade in trades))
    drawing = figure(7.6, 4.4 + 0.3 * ceil(len(used) / 4))
    axes = drawing.subplots()
    label = f"KV cache kept per request ({unit}, log scale)" if in_bytes else "KV cache kept"
    dress(axes, label, "score (0 to 100)")
    axes.plot(
        [t.size / factor for t in best], [100 * t.score for t in best],
        color=MUTED, linewidth=1.0, drawstyle="steps-post", zorder=1,
    )  # fmt: skip
    for trade in trades:
        style, wins = known[trade.method], trade in best
        axes.plot(
            [trade.size / factor], [100 * trade.score], linestyle="",
            marker=style.marker, markersize=8 if wins else 5.5, zorder=3 if wins else 2,
            color=style.colour if wins else MUTED, alpha=1.0 if wins else 0.45,
        )  # fmt: skip
    _name_front(axes, best, factor)
    if in_bytes:
        _plain_log(axes, [trade.size / factor for trade in trades])
    else:
        _shares(axes, [trade.size for trade in trades])
        axes.set_xlim(left=min(trade.size for trade in trades) / 2.2)
    legend(drawing, [_handle(name, known[name], line=False) for name in used])
    return drawing


def front(trades: Sequence[Trade]) -> list[Trade]:
    """The cases that no other one beats, by rising size; of equal ones the first.

    One beats another that is no better and not smaller by more than a factor of :data:`SAME`.
    """

    def beats(other: Trade, trade: Trade) -> bool:
        if other.size > SAME * trade.size or other.score < trade.score:
            return False
        if other.score > trade.score:
            return True
        return (other.size, trades.index(other)) < (trade.size, trades.index(trade))

    best = [trade for trade in trades if not any(beats(other, trade) for other in trades)]
    return sorted(best, key=lambda trade: (trade.size, trade.score))


def held(traces: Sequence[Held], order: Sequence[str] = ()) -> Any:
    """Bytes of KV cache in use over time, one line per case."""
    cases = list(dict.fromkeys(trace.case for trace in traces))
    known = case_styles(cases, order)
    factor, unit = _unit(max((max(trace.held, default=0) for trace in traces), default=0))
    drawing = figure(7.6, 3.8 + 0.3 * ceil(len(cases) / 3))
    axes = drawing.subplots()
    dress(axes, "seconds since the first request", f"KV cache held ({unit})")
    for trace in traces:
        axes.plot(
            trace.seconds, [count / factor for count in trace.held], drawstyle="steps-post",
            color=known[trace.case].colour, linestyle=known[trace.case].dash, linewidth=1.6,
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    handles = [_handle(case_name(case), known[case], marker=False) for case in cases]
    legend(drawing, handles, 3)
    return drawing


def _curve(axes: Any, points: Sequence[Point], style: Style, scale: float, full: bool) -> None:
    points = sorted(points, key=lambda point: point.keep)
    at, scores = [p.keep for p in points], [scale * p.score for p in points]
    low = [scale * (p.score if p.low is None else p.low) for p in points]
    high = [scale * (p.score if p.high is None else p.high) for p in points]
    if full:
        for level, bottom, top in zip(scores, low, high, strict=True):
            axes.axhline(level, color=style.colour, linestyle=style.dash, linewidth=1.1, zorder=1)
            axes.axhspan(bottom, top, color=style.colour, alpha=0.07, linewidth=0, zorder=0)
        return
    _line(axes, at, scores, style)
    axes.fill_between(at, low, high, color=style.colour, alpha=0.13, linewidth=0)
    if len(at) == 1:
        axes.vlines(at, low, high, color=style.colour, linewidth=1.2)
    asked = [(p.keep, scale * p.score) for p in points if not p.measured]
    if asked:
        axes.plot(
            [x for x, _ in asked], [y for _, y in asked], linestyle="", marker=style.marker,
            markersize=4.6, color=style.colour, markerfacecolor="white", zorder=4,
        )  # fmt: skip


def _line(axes: Any, at: Sequence[float], values: Sequence[float], style: Style) -> None:
    axes.plot(
        at, values, color=style.colour, linestyle=style.dash, linewidth=1.6,
        marker=style.marker, markersize=4.6, zorder=3,
    )  # fmt: skip


def _handle(name: str, style: Style, line: bool = True, marker: bool = True) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(
        [], [], color=style.colour, linestyle=style.dash if line else "", linewidth=1.6,
        marker=style.marker if marker and (style.colour != INK or not line) else "",
        markersize=5, label=name,
    )  # fmt: skip


def _shares(axes: Any, keeps: Sequence[float]) -> None:
    """A log axis of shares with round percentages, a little wider than the data."""
    low, high = min(keeps), max(keeps)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.25, max(high, low * 1.2) * 1.15)
    shown = [share for share in SHARES if low / 1.25 <= share <= high * 1.15]
    if len(shown) < 2:
        shown = sorted({round(low, 4), round(high, 4)})
    axes.set_xticks(shown, [f"{100 * share:g} %" for share in shown])
    axes.set_xticks([], minor=True)


def _plain_log(axes: Any, values: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_xlim(min(values) / 2.2, max(values) * 1.4)  # room for names on the left
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _name_front(axes: Any, best: Sequence[Trade], factor: float) -> None:
    for trade in best:
        axes.annotate(
            trade.name, (trade.size / factor, 100 * trade.score), textcoords="offset points",
            xytext=(-5, 6), ha="right", fontsize=7.5, color=INK,
        )  # fmt: skip
    axes.margins(y=0.12)


def _heat(
    axes: Any, heat: Heat, lengths: list[float], depths: list[float], colours: Any, norm: Any
) -> Any:
    import numpy as np

    nothing = (float("nan"), 0)
    rows = [[100 * heat.cells.get((x, y), nothing)[0] for x in lengths] for y in depths]
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(rows), cmap=colours, norm=norm, edgecolors=GRID, linewidth=0.5
    )
    axes.set_facecolor("none")
    axes.set_title(heat.title, loc="left", fontsize=9, color=INK)
    axes.set_ylim(len(depths), 0)
    axes.tick_params(length=0, labelsize=7.5, colors=MUTED)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xticks(*_ticks(lengths, [_tokens(length) for length in lengths], 6))
    axes.set_yticks(*_ticks(depths, [f"{100 * depth:.0f}" for depth in depths], 11))
    if len(lengths) <= 8 and len(depths) <= 11:
        for row, values in enumerate(rows):
            for column, value in enumerate(values):
                if value == value:
                    red, green, blue, _ = colours(norm(value))
                    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
                    axes.text(
                        column + 0.5, row + 0.5, f"{value:.0f}", ha="center", va="center",
                        fontsize=7, color="black" if bright else "white",
                    )  # fmt: skip
    return mesh


def _ticks(values: Sequence[float], names: Sequence[str], most: int) -> tuple[list[float], Any]:
    step = ceil(len(values) / most)
    shown = range(0, len(values), step)
    return [index + 0.5 for index in shown], [names[index] for index in shown]


def _tokens(length: float) -> str:
    return f"{length / 1024:.3g}k" if length >= 1024 else f"{length:g}"


def case_name(case: Case) -> str:
    """A case as people say it."""
    return case.method if case.method == "full" else f"{case.method}, keep {case.keep:g}"


def _unit(most: float) -> tuple[int, str]:
    return next((size, name) for size, name in UNITS if most >= size or size == 1)
