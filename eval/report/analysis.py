"""Everything that a report says, computed once from the scores; the pages only lay it out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from uncomp.eval.report import regressions, stats
from uncomp.eval.report.cases import BASELINE, FULL, Group, Index, Measure, grouped
from uncomp.eval.report.notes import notes
from uncomp.eval.report.regressions import Cut, Flips, Kept, Lengths
from uncomp.eval.report.stats import Difference, Estimate
from uncomp.eval.run.records import Case, Scored


@dataclass(frozen=True)
class Result:
    """One case on one measure or on the macro-average of a group.

    Attributes:
        of: which measure or group. case: how it was served.
        estimate: mean, samples and interval.
        complete: whether it has every task of the group (a measure is complete).
        vs_full, vs_snapkv: against the full cache, and against SnapKV at the same keep ratio;
            None for these themselves and where nothing can be paired.
        kept: measured keep ratio.
        lengths: change of the answers' lengths against the full cache.
    """

    of: Measure | Group
    case: Case
    estimate: Estimate
    complete: bool
    vs_full: Difference | None
    vs_snapkv: Difference | None
    kept: Kept
    lengths: Lengths | None


@dataclass(frozen=True)
class Analysis:
    """A whole run.

    Attributes:
        cases: the full cache first, then methods in the order of the scores, keep ratios falling.
        groups: accuracies (all tasks first), then metrics that are averaged on their own.
        macros: results of groups, in the order of groups and cases. results: of measures.
        flips: per case other than the full cache. cuts: per task. kept: per case.
        lengths: per case other than the full cache; over all tasks.
        notes: what a reader must know before trusting a number.
        samples, answers: distinct ones in the run.
    """

    cases: tuple[Case, ...]
    groups: tuple[Group, ...]
    macros: tuple[Result, ...]
    results: tuple[Result, ...]
    flips: tuple[Flips, ...]
    cuts: tuple[Cut, ...]
    kept: Mapping[Case, Kept]
    lengths: Mapping[Case, Lengths]
    notes: tuple[str, ...]
    samples: int
    answers: int


def analyse(scored: Sequence[Scored], resamples: int = stats.RESAMPLES) -> Analysis:
    """Everything a report says about ``scored``.

    Args:
        scored: of one run; the order of methods is kept.
        resamples: bootstrap replicates per interval.

    Raises:
        ValueError: nothing was scored, or an answer was scored twice.
    """
    finite = [s for s in scored if math.isfinite(s.value)]
    if not finite:
        raise ValueError(
            f"nothing to report: {len(scored)} scores, none with a finite value; "
            "run the predict and score stages first"
        )
    index = Index(finite)
    full = index.scored.get(FULL, [])
    others = [case for case in index.cases if case != FULL]
    groups = grouped(index.measures)
    changes = {case: regressions.lengths(full, index.scored[case]) for case in others}
    macros = [
        result
        for group in groups
        for case in index.cases
        if (result := _result(index, group, group.measures, case, resamples))
    ]
    results = [
        result
        for measure in index.measures
        for case in index.cases
        if (result := _result(index, measure, (measure,), case, resamples))
    ]
    return Analysis(
        cases=tuple(index.cases),
        groups=tuple(groups),
        macros=tuple(macros),
        results=tuple(results),
        flips=_flips(index, groups, others),
        cuts=regressions.cuts(finite),
        kept={case: regressions.kept(index.scored[case]) for case in index.cases},
        lengths={case: change for case, change in changes.items() if change},
        notes=tuple(notes(scored, index)),
        samples=len({(s.task, s.sample) for s in finite}),
        answers=len({(s.task, s.sample, s.turn, s.case) for s in finite}),
    )


def _flips(index: Index, groups: Sequence[Group], others: Sequence[Case]) -> tuple[Flips, ...]:
    accuracies = {m for group in groups if group.metric == "score" for m in group.measures}

    def judged(case: Case) -> list[Scored]:
        found = index.scored.get(case, [])
        return [s for s in found if Measure(s.task, s.metric, s.higher_is_better) in accuracies]

    full = judged(FULL)
    found = [regressions.flips(full, mine) for case in others if (mine := judged(case))]
    return tuple(flip for flip in found if flip) if full else ()


def best(macros: Sequence[Result]) -> set[tuple[Group, Case]]:
    """The best cases other than the full cache at each keep ratio of each group; ties all count.

    A case that lacks a task of its group cannot be the best, and one alone at its ratio is not.
    """
    rivals: dict[tuple[Group, float], list[Result]] = {}
    for result in macros:
        if isinstance(result.of, Group) and result.case != FULL and result.complete:
            rivals.setdefault((result.of, result.case.keep), []).append(result)
    winners = set()
    for (group, _), results in rivals.items():
        if len(results) > 1:
            choose = max if group.higher else min
            top = choose(result.estimate.mean for result in results)
            winners |= {(group, r.case) for r in results if math.isclose(r.estimate.mean, top)}
    return winners


def _result(
    index: Index,
    of: Measure | Group,
    measures: Sequence[Measure],
    case: Case,
    resamples: int,
) -> Result | None:
    mine = index.of(measures, case)
    if not any(mine):
        return None
    estimate = stats.estimate(mine, resamples)
    snapkv = Case(BASELINE, case.keep)

    def against(reference: Case) -> Difference | None:
        if case in (FULL, reference):
            return None
        theirs = index.of(measures, reference)
        return stats.difference(list(zip(mine, theirs, strict=True)), resamples)

    scored = index.under(measures, case)
    full = index.under(measures, FULL) if case != FULL else []
    return Result(
        of=of,
        case=case,
        estimate=estimate,
        complete=estimate.tasks == len(measures),
        vs_full=against(FULL),
        vs_snapkv=against(snapkv),
        kept=regressions.kept(scored),
        lengths=regressions.lengths(full, scored),
    )
