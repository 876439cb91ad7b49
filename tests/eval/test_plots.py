"""Plots: what they show, that they stand alone, and that they leave matplotlib as it was."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("matplotlib")
import matplotlib

from uncomp.eval.report.inputs import Held, Throughput
from uncomp.eval.report.plot_style import COLOURS, DARK, case_styles, styles, svg
from uncomp.eval.report.plots import (
    Heat,
    Panel,
    Point,
    Trade,
    accuracy,
    front,
    held,
    needle,
    pareto,
    throughput,
)
from uncomp.eval.run.records import Case

CURVES = {
    "full": [Point(1.0, 0.9, 0.85, 0.95)],
    "uncomp": [Point(0.25, 0.8, 0.7, 0.9), Point(0.5, 0.9, 0.8, 0.95)],
    "snapkv": [Point(0.25, 0.6, None, None, measured=False)],
}
TRADES = [
    Trade("full", "full", 1.0, 0.90),
    Trade("a", "a, keep 0.5", 0.5, 0.95),
    Trade("b", "b, keep 0.5", 0.49, 0.80),  # 2 % smaller: as large as a
    Trade("a", "a, keep 0.25", 0.25, 0.70),
    Trade("b", "b, keep 0.25", 0.25, 0.70),
    Trade("c", "c, keep 0.1", 0.1, 0.20),
]


def drawn() -> dict[str, object]:
    cases = (Case("full"), Case("uncomp", 0.25), Case("uncomp", 0.5))
    loads = [Throughput(c, n, 100.0 * n, 90.0 * n, 110.0 * n, 3) for c in cases for n in (1, 4)]
    cells = {(length, depth): (0.5, 3) for length in (4096, 8192) for depth in (0.0, 0.5)}
    return {
        "accuracy": accuracy([Panel("all tasks", CURVES)]),
        "multiples": accuracy([Panel(f"task {i}", CURVES) for i in range(5)]),
        "one ratio": accuracy([Panel("task", {"uncomp": [Point(0.25, 0.5)]})]),
        "needle": needle([Heat("full", cells), Heat("uncomp", {(4096, 0.0): (1.0, 3)})]),
        "throughput": throughput(loads),
        "pareto shares": pareto(TRADES),
        "pareto bytes": pareto([Trade(t.method, t.name, 2e9 * t.size, 0.5) for t in TRADES], True),
        "held": held([Held(case, (0.0, 1.0, 2.0), (0, 2**30, 2**20)) for case in cases]),
    }


def test_every_plot_is_one_well_formed_svg() -> None:
    for name, figure in drawn().items():
        text = svg(figure)
        assert ElementTree.fromstring(text).tag.endswith("svg"), name
        links = re.findall(r'(?:href|src)="([^"]*)"', text)
        assert [link for link in links if not link.startswith(("#", "data:"))] == [], name
        assert "prefers-color-scheme: dark" in text, name


def test_every_axis_has_its_label_and_unit() -> None:
    labels = {}
    for name, figure in drawn().items():
        axes = figure.axes[0]  # type: ignore[attr-defined]
        labels[name] = (axes.get_xlabel(), axes.get_ylabel())
    score = "score (0 to 100)"
    assert labels["accuracy"] == ("KV cache kept (measured, log scale)", score)
    assert labels["needle"] == ("length (tokens)", "depth (%)")
    assert labels["throughput"] == ("requests in flight", "generated tokens/s, all requests")
    assert labels["pareto bytes"] == ("KV cache kept per request (GiB, log scale)", score)
    assert labels["held"] == ("seconds since the first request", "KV cache held (GiB)")


def test_accuracy_shows_points_bands_and_the_full_cache() -> None:
    axes = accuracy([Panel("all tasks", CURVES)]).axes[0]
    assert axes.get_xscale() == "log"
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert ([0.25, 0.5], [80.0, 90.0]) in lines
    assert [90.0, 90.0] in [ys for _, ys in lines]  # the full cache, across
    band = max(axes.collections, key=lambda item: len(item.get_paths()[0].vertices))
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (70.0, 95.0)
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [list(line.get_xdata()) for line in hollow] == [[0.25]]  # asked for, not measured


def test_lower_is_better_is_not_scaled() -> None:
    panel = Panel("nll", {"uncomp": [Point(0.25, 2.5)]}, "nll (lower is better)", 1.0)
    axes = accuracy([panel]).axes[0]
    assert list(axes.lines[0].get_ydata()) == [2.5]
    assert axes.get_ylabel() == "nll (lower is better)"


def test_needle_cells_lie_where_they_belong() -> None:
    cells = {(4096, 0.0): (0.1, 2), (8192, 0.0): (0.2, 2), (8192, 1.0): (0.4, 2)}
    axes = needle([Heat("uncomp", cells)]).axes[0]
    numbers = {tuple(text.get_position()): text.get_text() for text in axes.texts}
    assert numbers == {(0.5, 0.5): "10", (1.5, 0.5): "20", (1.5, 1.5): "40"}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["4k", "8k"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "100"]
    assert axes.get_ylim() == (2, 0)  # the start of the text is on top


def test_front() -> None:
    # of two equal ones the first; the full cache is beaten by a at half of it
    names = [trade.name for trade in front(TRADES)]
    assert names == ["c, keep 0.1", "a, keep 0.25", "a, keep 0.5"]


def test_beaten_cases_are_grey() -> None:
    axes = pareto(TRADES).axes[0]
    grey = {round(line.get_ydata()[0]) for line in axes.lines[1:] if line.get_alpha() < 1}
    assert grey == {90, 80, 70}
    assert {text.get_text() for text in axes.texts} == {trade.name for trade in front(TRADES)}


def test_methods_look_different() -> None:
    names = [f"m{index}" for index in range(18)]
    looks = [(s.colour, s.marker, str(s.dash)) for s in styles(["full", *names]).values()]
    assert len(set(looks)) == 19
    assert len(set(COLOURS)) == len(COLOURS)


def test_a_method_looks_the_same_whatever_it_is_shown_with() -> None:
    order = ["full", "a", "b"]
    assert styles([*order, "b"])["b"] == styles(order)["b"]
    alone = case_styles([Case("b", 0.5)], order)[Case("b", 0.5)]
    assert (alone.colour, alone.marker) == (styles(order)["b"].colour, styles(order)["b"].marker)


def test_dark_pages_recolour_ink_only() -> None:
    text = svg(accuracy([Panel("all tasks", CURVES)]))
    for light in DARK:
        assert light in text
    assert not set(DARK) & set(COLOURS)


def test_the_same_plot_is_the_same_text() -> None:
    assert svg(pareto(TRADES)) == svg(pareto(TRADES))


def test_settings_of_matplotlib_are_left_alone() -> None:
    before = dict(matplotlib.rcParams)
    svg(accuracy([Panel("all tasks", CURVES)]))
    svg(needle([Heat("full", {(4096, 0.5): (0.5, 3)})]))
    assert dict(matplotlib.rcParams) == before


def test_times_and_bytes_must_match() -> None:
    with pytest.raises(ValueError, match="2 times but 1"):
        Held(Case("full"), (0.0, 1.0), (1.0,))
