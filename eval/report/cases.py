"""What was run: measures, which of them may be averaged, and the scores by measure and case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from uncomp.eval.report import stats
from uncomp.eval.run.records import Case, Scored

FULL = Case("full")
BASELINE = "snapkv"


@dataclass(frozen=True, order=True)
class Measure:
    """A metric of a task. higher: whether higher is better."""

    task: str
    metric: str
    higher: bool = True

    @property
    def family(self) -> str:
        """The part of the task's name before the slash."""
        return self.task.partition("/")[0]


@dataclass(frozen=True)
class Group:
    """Measures that may be averaged: the accuracies of a family or of all, or one other metric.

    Attributes:
        name: family, or ``all tasks``.
        metric: ``score`` for accuracies, which may be of several kinds; else the metric's name.
        higher: whether higher is better.
        measures: what is averaged.
    """

    name: str
    metric: str
    higher: bool
    measures: tuple[Measure, ...]


class Index:
    """The scores by measure and by case."""

    def __init__(self, scored: Sequence[Scored]) -> None:
        self.values: dict[tuple[Measure, Case], dict[str, dict[int, float]]] = {}
        self.scored: dict[Case, list[Scored]] = {}
        self.parts: dict[tuple[str, Case], list[Scored]] = {}
        for s in scored:
            measure = Measure(s.task, s.metric, s.higher_is_better)
            samples = self.values.setdefault((measure, s.case), {})
            turns = samples.setdefault(s.sample, {})
            if s.turn in turns:
                raise ValueError(
                    f"{s.task} {s.sample} turn {s.turn} has {s.metric} twice under {s.case}; each "
                    "answer is scored once: remove the older file of scores and score again"
                )
            turns[s.turn] = s.value
            self.scored.setdefault(s.case, []).append(s)
            self.parts.setdefault((s.task, s.case), []).append(s)
        self.measures = sorted({measure for measure, _ in self.values})
        self.cases = ordered_cases(self.scored)

    def of(self, measures: Sequence[Measure], case: Case) -> list[stats.Values]:
        return [self.values.get((measure, case), {}) for measure in measures]

    def under(self, measures: Sequence[Measure], case: Case) -> list[Scored]:
        tasks = {measure.task for measure in measures}
        return [s for task in sorted(tasks) for s in self.parts.get((task, case), [])]


def ordered_cases(cases: Mapping[Case, object] | Sequence[Case]) -> list[Case]:
    """The full cache first, then methods by first appearance, each with falling keep ratios."""
    methods = list(dict.fromkeys(case.method for case in cases))
    return sorted(cases, key=lambda case: (case != FULL, methods.index(case.method), -case.keep))


def grouped(measures: Sequence[Measure]) -> list[Group]:
    """What is averaged with what.

    The accuracies of a family are averaged, and those of all families if there are several. A
    metric where lower is better is only averaged with itself, within its family; so are the other
    metrics of a task that has such a metric (agreement of a likelihood task is no accuracy).
    """
    apart = {measure.task for measure in measures if not measure.higher}
    accuracies: dict[str, list[Measure]] = {}
    alone: dict[tuple[str, str, bool], list[Measure]] = {}
    for measure in measures:
        if measure.task in apart:
            key = (measure.family, measure.metric, measure.higher)
            alone.setdefault(key, []).append(measure)
        else:
            accuracies.setdefault(measure.family, []).append(measure)
    groups = []
    if len(accuracies) > 1:
        everything = tuple(measure for members in accuracies.values() for measure in members)
        groups.append(Group("all tasks", "score", True, everything))
    groups += [Group(name, "score", True, tuple(found)) for name, found in accuracies.items()]
    groups += [Group(*key, tuple(found)) for key, found in alone.items()]
    return groups
