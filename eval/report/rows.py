"""A finished run as CSV rows, small enough to be committed, and read back."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from uncomp.eval.report.analysis import Analysis, Result
from uncomp.eval.report.cases import Group
from uncomp.eval.report.facts import data_hash, line
from uncomp.eval.report.stats import Difference


@dataclass(frozen=True)
class Row:
    """One case on one task or on the macro-average of a family; the columns of the file.

    Columns are only ever added, at the end. An empty cell means there is no such number.

    Attributes:
        task: full name, the family, or ``all tasks``.
        over: ``task`` or ``macro`` (mean of tasks' means).
        metric: its name; ``score`` for a mean of accuracies.
        better: ``higher`` or ``lower``.
        method, keep: the case; keep as asked for.
        keep_measured, keep_n: mean of what the engine said, over keep_n turns.
        n, turns, tasks: samples, answers and tasks.
        mean, low, high, interval: mean, 95 % interval and how it was made, see
            :class:`uncomp.eval.report.stats.Interval`; values in [0, 1], or nats per token.
        full_n, full_difference, full_low, full_high, full_p, full_unpaired: samples in both, the
            difference to the full cache with interval, p of the sign test, turns without partner.
        snapkv_n, ...: the same against SnapKV at the same keep ratio.
        length_n, length_change: answers in both, mean change of generated tokens against full.
        model, revision, data, versions, machine, commit, date, seed: facts of the run; data is
            :func:`uncomp.eval.report.facts.data_hash` of the task's files.
    """

    task: str
    over: str
    metric: str
    better: str
    method: str
    keep: float
    keep_measured: float | None
    keep_n: int
    n: int
    turns: int
    tasks: int
    mean: float
    low: float | None
    high: float | None
    interval: str
    full_n: int | None
    full_difference: float | None
    full_low: float | None
    full_high: float | None
    full_p: float | None
    full_unpaired: int | None
    snapkv_n: int | None
    snapkv_difference: float | None
    snapkv_low: float | None
    snapkv_high: float | None
    snapkv_p: float | None
    snapkv_unpaired: int | None
    length_n: int | None
    length_change: float | None
    model: str
    revision: str
    data: str
    versions: str
    machine: str
    commit: str
    date: str
    seed: str


COLUMNS = tuple(field.name for field in fields(Row))


def rows(analysis: Analysis, facts: Mapping[str, Any]) -> list[Row]:
    """Macro-averages first, then every task and case."""
    return [_row(result, facts) for result in (*analysis.macros, *analysis.results)]


def write_rows(found: Sequence[Row], path: Path) -> Path:
    """Write a CSV file with a header; numbers with six significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([_cell(getattr(row, name)) for name in COLUMNS] for row in found)
    return path


def read_rows(path: Path) -> list[Row]:
    """Read what :func:`write_rows` wrote.

    Raises:
        ValueError: a column is missing or unknown, or a cell is not of the column's type.
    """
    types = get_type_hints(Row)
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        given = tuple(reader.fieldnames or ())
        if set(given) != set(COLUMNS):
            raise ValueError(
                f"{path}: missing columns {sorted(set(COLUMNS) - set(given))}, unknown columns "
                f"{sorted(set(given) - set(COLUMNS))}; write it again with this version"
            )
        return [
            Row(**{name: _parse(record[name], types[name], name, path) for name in COLUMNS})
            for record in reader
        ]


def _row(result: Result, facts: Mapping[str, Any]) -> Row:
    of, estimate = result.of, result.estimate
    macro = isinstance(of, Group)
    seed = facts.get("seeds", facts.get("seed"))
    keys = ("model", "revision", "versions", "machine", "commit", "date")
    told: dict[str, Any] = {name: line(facts[name]) if facts.get(name) else "" for name in keys}
    return Row(
        task=of.name if isinstance(of, Group) else of.task,
        over="macro" if macro else "task",
        metric=of.metric,
        better="higher" if of.higher else "lower",
        method=result.case.method,
        keep=result.case.keep,
        keep_measured=result.kept.mean,
        keep_n=result.kept.n,
        n=estimate.n,
        turns=estimate.turns,
        tasks=estimate.tasks,
        mean=estimate.mean,
        low=estimate.interval.low,
        high=estimate.interval.high,
        interval=estimate.interval.how,
        **_against("full", result.vs_full),
        **_against("snapkv", result.vs_snapkv),
        length_n=result.lengths.n if result.lengths else None,
        length_change=result.lengths.change if result.lengths else None,
        data=data_hash(facts, None if isinstance(of, Group) else of.task),
        seed="" if seed is None else line(seed),
        **told,
    )


def _against(name: str, difference: Difference | None) -> dict[str, Any]:
    values: Sequence[Any] = (None,) * 6
    if difference:
        ends = difference.interval
        lonely = difference.only_case + difference.only_reference
        values = (
            difference.n, difference.difference, ends.low, ends.high, difference.p_sign, lonely,
        )  # fmt: skip
    parts = ("n", "difference", "low", "high", "p", "unpaired")
    return {f"{name}_{part}": value for part, value in zip(parts, values, strict=True)}


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def _parse(text: str, kind: Any, name: str, path: Path) -> Any:
    if kind is str:
        return text
    optional = kind not in (int, float)
    if text == "" and optional:
        return None
    number = int if kind in (int, int | None) else float
    try:
        return number(text)
    except ValueError as error:
        raise ValueError(f"{path}: {name} is {text!r}, not {number.__name__}") from error
