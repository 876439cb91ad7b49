"""One method against every other, at equal keep ratios, over one run or several.

A report compares everything with the full cache and with SnapKV; this answers whether one method is
better than each of the others, also on the average of several models (a run each).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from uncomp.eval.report.cases import FULL, Index, grouped
from uncomp.eval.report.stats import Values, difference
from uncomp.eval.run.records import Case, Scored


@dataclass(frozen=True)
class Line:
    """A method minus another at one keep ratio.

    Attributes:
        over: what is averaged (a family of tasks), metric: its metric.
        method, other: which; ``full`` is compared at every ratio.
        keep: keep ratio.
        runs, tasks, n: in how many runs, strata (tasks of runs) and samples both have answers.
        mean, reference, difference: means over strata; accuracies in points of 100.
        low, high: 95 % bootstrap interval of the difference, paired by sample; None: all equal.
    """

    over: str
    metric: str
    method: str
    other: str
    keep: float
    runs: int
    tasks: int
    n: int
    mean: float
    reference: float
    difference: float
    low: float | None
    high: float | None


def compare(runs: Sequence[Sequence[Scored]], method: str) -> list[Line]:
    """All lines, by group of tasks, other method and falling keep ratio.

    Args:
        runs: scores of each.
        method: compared with the others.

    Raises:
        ValueError: no run has it; says which there are.
    """
    indices = [Index(scored) for scored in runs]
    cases = list(dict.fromkeys(case for index in indices for case in index.cases))
    names = list(dict.fromkeys(case.method for case in cases))
    if method not in names:
        raise ValueError(f"no scores of method {method!r}; there are: {', '.join(names)}")
    keeps = sorted({c.keep for c in cases if c.method == method}, reverse=True)
    found = [
        _line(indices, name, method, other, keep)
        for name in dict.fromkeys(
            (g.name, g.metric) for index in indices for g in grouped(index.measures)
        )
        for other in names
        for keep in keeps
        if other != method
    ]
    return [line for line in found if line is not None]


def _line(
    indices: Sequence[Index], group: tuple[str, str], method: str, other: str, keep: float
) -> Line | None:
    theirs = FULL if other == FULL.method else Case(other, keep)
    pairs: list[tuple[Values, Values]] = []
    runs, points = 0, False
    for index in indices:
        for same in grouped(index.measures):
            if (same.name, same.metric) != group:
                continue
            left = index.of(same.measures, Case(method, keep))
            right = index.of(same.measures, theirs)
            pairs += zip(left, right, strict=True)
            runs += any(left) and any(right)
            points = same.metric == "score" and same.higher
    found = difference(pairs)
    if found is None:
        return None
    scale = 100 if points else 1
    ends: list[float | None] = [found.interval.low, found.interval.high]
    if found.interval.how == "all equal":
        ends = [None, None]
    low, high = (None if end is None else scale * end for end in ends)
    return Line(
        over=group[0],
        metric=group[1],
        method=method,
        other=other,
        keep=keep,
        runs=runs,
        tasks=found.tasks,
        n=found.n,
        mean=scale * found.mean,
        reference=scale * found.reference,
        difference=scale * found.difference,
        low=low,
        high=high,
    )


def markdown(lines: Sequence[Line]) -> str:
    """A table per group: other methods by keep ratio."""
    parts = []
    for over, metric in dict.fromkeys((line.over, line.metric) for line in lines):
        same = [line for line in lines if (line.over, line.metric) == (over, metric)]
        keeps = list(dict.fromkeys(line.keep for line in same))
        rows = [
            f"**{over}: {metric}, {same[0].method} minus ...**",
            "",
            f"| | {' | '.join(f'keep {keep:g}' for keep in keeps)} | n |",
            f"|---|{'---:|' * len(keeps)}---:|",
        ]
        for other in dict.fromkeys(line.other for line in same):
            cells = {line.keep: line for line in same if line.other == other}
            shown = [_cell(cells[keep]) if keep in cells else "-" for keep in keeps]
            count = max(line.n for line in cells.values())
            rows.append(f"| {other} | {' | '.join(shown)} | {count} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _cell(line: Line) -> str:
    digits = 1 if line.metric == "score" else 3
    shown = f"{line.difference:+.{digits}f}"
    if line.low is None or line.high is None:
        return shown
    return f"{shown} ({line.low:.{digits}f} to {line.high:.{digits}f})"


def as_csv(lines: Sequence[Line]) -> str:
    """With a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(Line.__annotations__), lineterminator="\n")
    writer.writeheader()
    for line in lines:
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(line).items()}
        writer.writerow(rounded)
    return out.getvalue()
