"""The tables of a report, from its analysis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uncomp.eval.report.analysis import Analysis, Result, best
from uncomp.eval.report.blocks import Cell, Table, table
from uncomp.eval.report.cases import FULL, Group
from uncomp.eval.report.facts import MISSING, data_files, run_facts
from uncomp.eval.report.regressions import Flips, Lengths
from uncomp.eval.report.wording import (
    NONE,
    difference_cell,
    mean_cell,
    number,
    share,
    tokens,
)
from uncomp.eval.run.records import Case

BEST = (
    " Marked: the best mean of the compressed methods at a keep ratio, whether or not the "
    "difference to the next is larger than its interval."
)
# Metrics in nats per token, see uncomp.eval.tasks.teacher_forcing.
NATS = ("nll", "nll_increase", "kl")


def unit(of: Any) -> str:
    """What the numbers of a measure or group are."""
    if of.higher:
        return "0 to 100, higher is better"
    return "lower is better" + (", nats per token" if of.metric in NATS else "")


def headline(analysis: Analysis, group: Group) -> Table:
    """Macro-averages of a group: methods by keep ratio, the best compressed one marked."""
    found = {r.case: r for r in analysis.macros if r.of == group}
    # Compressed ones first: on a narrow screen the column of the full cache can wait.
    keeps = sorted({case.keep for case in found}, key=lambda keep: (keep == FULL.keep, -keep))
    winners = best(analysis.macros)
    rows = []
    for method in dict.fromkeys(case.method for case in found):
        row: list[Cell | str] = [method]
        for keep in keeps:
            result = found.get(Case(method, keep))
            row.append(_macro_cell(result, (group, Case(method, keep)) in winners))
        rows.append(row)
    count = len(group.measures)
    return table(
        f"{group.name}: {group.metric} ({unit(group)})",
        ("method", *(f"keep {keep:g}" for keep in keeps)),
        rows,
        f"Mean over {count} task{'s' if count > 1 else ''}." + (BEST if winners else ""),
    )


def comparison(analysis: Analysis, of: Any, results: Sequence[Result]) -> Table:
    """Every case of one measure or group against the full cache and SnapKV."""
    rows = []
    for result in (r for r in results if r.of == of):
        lengths = result.lengths
        rows.append(
            [
                *_case(result.case),
                _kept_cell(result),
                _macro_cell(result, False),
                difference_cell(result.vs_full, of.higher),
                difference_cell(result.vs_snapkv, of.higher),
                _length_cell(lengths) if lengths and result.case != FULL else NONE,
            ]
        )
    name = of.name if isinstance(of, Group) else of.task
    head = ("method", "keep", "kept", of.metric, "vs full", "vs SnapKV", "length (tokens)")
    return table(f"{name}: {of.metric} ({unit(of)})", head, rows)


def kept(analysis: Analysis) -> Table:
    """Asked and measured keep ratios, per case over all turns."""
    rows = []
    for case in analysis.cases:
        found = analysis.kept[case]
        values = (found.mean, found.low, found.high)
        rows.append([*_case(case), *(share(v) for v in values), str(found.n), str(found.silent)])
    head = ("method", "asked", "mean", "lowest", "highest", "turns", "not said")
    note = "Kept bytes over the bytes of the full cache, as the engine measured it in each turn."
    return table("Kept against asked", head, rows, note)


def cuts(analysis: Analysis) -> Table:
    """Context left out because the prompt was too long, per task."""
    rows = [
        [c.task, str(c.turns), str(c.cut), f"{c.mean:.0f}", str(c.most), f"{c.prompt:.0f}"]
        for c in analysis.cuts
    ]
    head = ("task", "prompts", "cut", "mean cut (tokens)", "most (tokens)", "prompt (tokens)")
    note = "Mean over the prompts that were cut; a prompt's length is what was sent."
    return table("Cut to fit the model", head, rows, note)


def flips(analysis: Analysis) -> Table:
    """How many answers became wrong and right, per case."""
    rows = []
    for found in analysis.flips:
        net = len(found.gained) - len(found.lost)
        rows.append(
            [
                *_case(found.case),
                str(found.compared),
                str(found.right_full),
                _share_cell(len(found.lost), found.right_full),
                _share_cell(len(found.gained), found.compared - found.right_full),
                tokens(net).replace(".0", ""),
                str(found.unpaired),
            ]
        )
    head = ("method", "keep", "answers", "right with full", "lost", "gained", "net", "unpaired")
    note = (
        "Right: a score of at least 0.5. Lost: of those right with the full cache. Gained: of "
        "those wrong with it. Only accuracies: likelihoods have no right and wrong."
    )
    return table("Answers that changed", head, rows, note)


def flip_list(found: Flips, most: int) -> Table:
    """The changed answers of one case, lost ones first, ``most`` at most; a note says so."""
    changed = [("lost", f) for f in found.lost] + [("gained", f) for f in found.gained]
    rows = [
        [f.task, f.sample, str(f.turn), what, number(f.full, True), number(f.value, True)]
        for what, f in changed[:most]
    ]
    head = ("task", "sample", "turn", "change", "full", "case")
    note = "Scores of 0 to 100."
    if len(changed) > most:
        note += f" The first {most} of {len(changed)}; all are in flips.csv."
    return table("Changed answers", head, rows, note, words=True)


def lengths(analysis: Analysis) -> Table:
    """Change of the answers' lengths against the full cache, per case over all tasks."""
    rows = [
        [
            *_case(case),
            str(found.n),
            f"{found.full:.1f}",
            f"{found.mean:.1f}",
            tokens(found.change),
            *(tokens(value) for value in found.quantiles),
        ]
        for case, found in analysis.lengths.items()
    ]
    ends = ("5 %", "25 %", "median", "75 %", "95 %")
    head = ("method", "keep", "answers", "full", "mean", "change", *ends)
    note = "Generated tokens per answer; the last five columns are quantiles of single changes."
    return table("Length of answers (tokens)", head, rows, note)


def facts_table(facts: Mapping[str, Any]) -> Table:
    """How it was run."""
    return table("Facts", ("fact", "value"), run_facts(facts), words=True)


def data_table(facts: Mapping[str, Any]) -> Table:
    """Where the data came from and under which licence."""
    keys = ("name", "licence", "origin", "sha256")
    rows = [[str(entry.get(key) or MISSING) for key in keys] for entry in data_files(facts)]
    return table("Data", keys, rows, words=True)


def _case(case: Case) -> tuple[Cell | str, Cell | str]:
    return case.method, f"{case.keep:g}"


def _macro_cell(result: Result | None, wins: bool) -> Cell:
    if result is None:
        return NONE
    of = result.of
    cell = mean_cell(result.estimate, of.higher, "best" if wins else "")
    if isinstance(of, Group) and not result.complete:
        some = f"only {result.estimate.tasks} of {len(of.measures)} tasks"
        return Cell(cell.text, (*cell.small, some))
    return cell


def _kept_cell(result: Result) -> Cell:
    found = result.kept
    if found.mean is None:
        return Cell(NONE.text, ("not said",))
    small = [f"{share(found.low)} to {share(found.high)}"] if found.low != found.high else []
    if found.silent:
        small.append(f"not said in {found.silent}")
    return Cell(share(found.mean), tuple(small))


def _length_cell(found: Lengths) -> Cell:
    low, high = tokens(found.quantiles[0]), tokens(found.quantiles[-1])
    return Cell(tokens(found.change), (f"5 to 95 %: {low} to {high}", f"n = {found.n}"))


def _share_cell(count: int, of: int) -> Cell:
    return Cell(str(count), (f"{100 * count / of:.1f} %",) if of else ())
