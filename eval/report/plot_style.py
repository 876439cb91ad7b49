"""How every plot looks, and how a figure becomes text: one SVG that suits light and dark pages."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from uncomp.eval.run.records import Case

INK, MUTED, GRID = "#24292f", "#57606a", "#d8dee4"
# The same three on a dark page; the colours of methods are read on both.
DARK = {INK: "#e6edf3", MUTED: "#9da7b3", GRID: "#30363d"}
# Okabe and Ito (2008), without black and yellow: distinguishable with any colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))


@dataclass(frozen=True)
class Style:
    """Colour, marker and dash of a method, the same in every plot of a report."""

    colour: str
    marker: str
    dash: Any


def styles(methods: Sequence[str]) -> dict[str, Style]:
    """A style per method; the full cache is ink and dashed. Colours repeat with another dash."""
    found = {"full": Style(INK, "*", DASHES[1])}
    for index, method in enumerate(name for name in dict.fromkeys(methods) if name != "full"):
        dash = DASHES[index // len(COLOURS) % len(DASHES)]
        found[method] = Style(COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], dash)
    return found


def case_styles(cases: Sequence[Case], order: Sequence[str] = ()) -> dict[Case, Style]:
    """A style per case: colour and marker of its method, a dash for the rank of its keep ratio."""
    known = styles([*order, *(case.method for case in cases)])
    found = {}
    for case in cases:
        keeps = sorted({other.keep for other in cases if other.method == case.method})
        dash = DASHES[keeps.index(case.keep) % len(DASHES)]
        found[case] = replace(known[case.method], dash=dash)
    return found


def figure(width: float, height: float) -> Any:
    """An empty figure, in inches; no pyplot, so no window and no state shared with the caller.

    Raises:
        ImportError: matplotlib is missing; says how to install it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib ({error}): pip install 'uncomp[eval]'") from error
    empty = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    FigureCanvasAgg(empty)
    return empty


def dress(axes: Any, x: str = "", y: str = "", title: str = "") -> None:
    """Labels, a light grid, no box."""
    axes.set_facecolor("none")
    axes.set_xlabel(x, color=INK, fontsize=9)
    axes.set_ylabel(y, color=INK, fontsize=9)
    axes.set_title(title, loc="left", fontsize=9.5, color=INK, fontweight="bold")
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=8, length=3, which="major")
    axes.tick_params(length=0, which="minor")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
        spine.set_linewidth(0.8)


def legend(drawing: Any, handles: Sequence[Any], columns: int = 4) -> None:
    """One legend above all axes."""
    drawing.legend(
        handles=list(handles),
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=2.6,
        columnspacing=1.6,
    )


def svg(drawing: Any) -> str:
    """A figure as SVG text: letters are paths, so that no font is needed; the same each time."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    # The salt makes ids, otherwise random, the same each time; restored on leaving.
    with rc_context({"svg.hashsalt": "uncomp", "svg.fonttype": "path"}):
        drawing.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    start = text.index("<svg")
    end = text.index(">", start) + 1
    return text[start:end] + _dark_style() + text[end:]


def _dark_style() -> str:
    rules = "".join(
        f'[style*="{part}: {light}"]{{{part}:{dark}!important}}'
        for light, dark in DARK.items()
        for part in ("fill", "stroke")
    )
    return f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>"
