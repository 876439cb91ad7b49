"""What a reader must know before trusting a number of a report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from uncomp.eval.report import regressions
from uncomp.eval.report.cases import BASELINE, FULL, Index, Measure, grouped
from uncomp.eval.run.records import Case, Scored

# Below this many samples a bootstrap interval is known to be too narrow.
FEW = 20


def notes(scored: Sequence[Scored], index: Index) -> list[str]:
    """Everything that is missing or weak, one sentence each.

    Args:
        scored: all scores. index: of those that are used, the finite ones.
    """
    whole, part = _missing(index)
    found = [
        _infinite(scored),
        "" if FULL in index.scored else "The full cache was not run: nothing to compare with.",
        _without_baseline(index.cases),
        f"Tasks not run in some cases, whose means over tasks lack them: {whole}." if whole else "",
        f"Tasks with fewer answers in some cases: {part}." if part else "",
        _few(index),
        _silent(index),
    ]
    return [note for note in found if note]


def _infinite(scored: Sequence[Scored]) -> str:
    lost = Counter(f"{s.task} {s.metric}" for s in scored if not math.isfinite(s.value))
    where = ", ".join(f"{name} ({count})" for name, count in sorted(lost.items()))
    return f"Values that are not finite are left out: {where}." if lost else ""


def _without_baseline(cases: Sequence[Case]) -> str:
    ratios = {case.keep for case in cases if case.keep < FULL.keep}
    without = ratios - {case.keep for case in cases if case.method == BASELINE}
    listed = ", ".join(f"{keep:g}" for keep in sorted(without, reverse=True))
    return f"SnapKV was not run at keep {listed}: no comparison with it there." if without else ""


def _missing(index: Index) -> tuple[str, str]:
    """Tasks that cases lack, as a whole and in part.

    Only accuracies: of likelihoods some have no value under the full cache.
    """
    groups = [group for group in grouped(index.measures) if group.metric == "score"]
    whole: dict[str, list[str]] = {}
    part: dict[str, list[str]] = {}
    for measure in dict.fromkeys(m for group in groups for m in group.measures):
        answers = {case: _answers(index, measure, case) for case in index.cases}
        everything = set().union(*answers.values())
        for case, found in answers.items():
            if len(found) < len(everything):
                name = f"{case.method} at {case.keep:g} ({len(everything - found)} missing)"
                (part if found else whole).setdefault(measure.task, []).append(name)
    return _listed(whole), _listed(part)


def _answers(index: Index, measure: Measure, case: Case) -> set[tuple[str, int]]:
    values = index.values.get((measure, case), {})
    return {(sample, turn) for sample, turns in values.items() for turn in turns}


def _listed(found: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{task}: {', '.join(names)}" for task, names in found.items())


def _few(index: Index) -> str:
    few = sorted({m.task for (m, _), samples in index.values.items() if len(samples) < FEW})
    listed = ", ".join(few)
    return f"Fewer than {FEW} samples, so that intervals are too narrow: {listed}." if few else ""


def _silent(index: Index) -> str:
    silent = [case for case in index.cases if regressions.kept(index.scored[case]).silent]
    if not silent:
        return ""
    return (
        f"The engine did not say what it kept in {len(silent)} of {len(index.cases)} cases (see "
        "Memory); the ratio asked for is no measurement."
    )
