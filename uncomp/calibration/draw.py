"""A picture of a calibration: entropy, group and budget of every KV head."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uncomp.calibration.file import CalibrationError

# More cells than this in a row leave no room for numbers.
COLUMNS_WITH_NUMBERS = 40


@dataclass(frozen=True)
class Panel:
    """One heat map: values[layer][head], drawn with layers from left to right."""

    title: str
    label: str
    values: Sequence[Sequence[float]]
    colours: str
    number: str  # format of a cell, e.g. "{:.2f}"
    whole: bool = False  # the values are integers 0..top, drawn in separate colours
    top: int = 0
    origin: float | None = None  # lowest value of the colour scale; None: the lowest value


def draw(path: str | Path, title: str, panels: Sequence[Panel]) -> None:
    """Write `panels`, one below the other, as a PNG.

    Raises:
        CalibrationError: matplotlib is missing or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CalibrationError(
            f"drawing needs matplotlib ({error}): pip install 'uncomp[calibrate]'"
        ) from error
    layers, heads = len(panels[0].values), len(panels[0].values[0])
    width = min(max(7.0, 2.4 + 0.36 * layers), 22.0)
    height = 0.7 + len(panels) * (0.95 + min(max(0.8, 0.34 * heads), 4.0))
    # Figure without pyplot: no window system, no state shared with the caller.
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=12, x=0.006, ha="left", fontweight="bold")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        _heat_map(figure, axes, panel)
    grid[-1].set_xlabel("layer")
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise CalibrationError(f"cannot write {path}: {error}") from error


def _heat_map(figure: Any, axes: Any, panel: Panel) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, Normalize

    layers, heads = len(panel.values), len(panel.values[0])
    columns = [[panel.values[layer][head] for layer in range(layers)] for head in range(heads)]
    flat = [value for row in columns for value in row]
    norm: Any
    if panel.whole:
        colours = colormaps[panel.colours].resampled(panel.top + 1)
        norm = BoundaryNorm([value - 0.5 for value in range(panel.top + 2)], panel.top + 1)
    else:
        colours = colormaps[panel.colours]
        low = min(flat) if panel.origin is None else panel.origin
        norm = Normalize(low, max(flat) if max(flat) > low else low + 1)
    mesh = axes.pcolormesh(columns, cmap=colours, norm=norm, edgecolors="white", linewidth=0.6)
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.set_ylabel("KV head")
    axes.invert_yaxis()
    axes.tick_params(length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _label(axes.xaxis, layers, 40)
    _label(axes.yaxis, heads, 16)
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=12, fraction=0.03)
    bar.set_label(panel.label, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    if panel.whole:
        bar.set_ticks(range(panel.top + 1))
        bar.minorticks_off()
        bar.ax.tick_params(length=0)
    if layers <= COLUMNS_WITH_NUMBERS:
        _numbers(axes, columns, panel.number, lambda value: colours(norm(value)))


def _label(axis: Any, count: int, most: int) -> None:
    """Name cells 0, 1, 2, ... in their middle; every second, fourth, ... when there are many."""
    step = 1
    while count / step > most:
        step *= 2
    shown = range(0, count, step)
    axis.set_ticks([index + 0.5 for index in shown], [str(index) for index in shown])


def _numbers(axes: Any, rows: list[list[float]], number: str, colour_of: Any) -> None:
    for row, values in enumerate(rows):
        for column, value in enumerate(values):
            red, green, blue, _ = colour_of(value)
            bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
            axes.text(
                column + 0.5, row + 0.5, number.format(value),
                ha="center", va="center", fontsize=6, color="black" if bright else "white",
            )  # fmt: skip
