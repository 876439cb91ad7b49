"""What changed against the full cache, answer by answer: right or wrong, length, kept, cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from uncomp.eval.run.records import Case, Scored

RIGHT = 0.5
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Question = tuple[str, str, int, str]
"""Task, sample, turn, metric."""


@dataclass(frozen=True)
class Flip:
    """An answer whose verdict changed. full, value: under the full cache and under the case."""

    task: str
    sample: str
    turn: int
    metric: str
    full: float
    value: float


@dataclass(frozen=True)
class Flips:
    """Verdicts of a case against the full cache.

    Attributes:
        case: which.
        compared: answers that both have, in metrics where higher is better.
        right_full: of these, right under the full cache.
        lost: right under the full cache, wrong under the case. gained: the other way round.
        unpaired: answers that only one of the two has.
    """

    case: Case
    compared: int
    right_full: int
    lost: tuple[Flip, ...]
    gained: tuple[Flip, ...]
    unpaired: int


@dataclass(frozen=True)
class Lengths:
    """Generated tokens of a case against the full cache, over the turns that both answered.

    Attributes:
        n: turns. mean, full: tokens per answer. change: mean minus full.
        quantiles: of the change of single answers, at :data:`QUANTILES`, in tokens.
    """

    n: int
    mean: float
    full: float
    change: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class Kept:
    """Measured keep ratio.

    Attributes:
        n: turns where the engine said. silent: turns where it did not.
        mean, low, high: over these turns; None if n is 0. low, high: the extremes.
    """

    n: int
    silent: int
    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Cut:
    """How much of the prompts of a task did not fit the model.

    Attributes:
        task: which. turns: prompts (each counted once, not per case). cut: of these, shortened.
        mean, most: tokens left out, over the shortened ones; 0 if none.
        prompt: mean tokens of a prompt as sent.
    """

    task: str
    turns: int
    cut: int
    mean: float
    most: int
    prompt: float


def flips(full: Iterable[Scored], case: Sequence[Scored], right: float = RIGHT) -> Flips | None:
    """Answers that became wrong or right. Metrics where lower is better have no verdict.

    Args:
        full, case: what was scored under the full cache and under one other case; agreement and
            other likelihood metrics, which are not right or wrong either, must not be in them.
        right: values from here on count as right.

    Returns:
        None if ``case`` has no metric with a verdict.
    """
    before, after = _verdicts(full), _verdicts(case)
    if not after:
        return None
    both = sorted(before.keys() & after.keys())
    changed = [Flip(*question, before[question], after[question]) for question in both]
    return Flips(
        case=case[0].case,
        compared=len(both),
        right_full=sum(before[question] >= right for question in both),
        lost=tuple(flip for flip in changed if flip.full >= right > flip.value),
        gained=tuple(flip for flip in changed if flip.value >= right > flip.full),
        unpaired=len(before.keys() ^ after.keys()),
    )


def lengths(full: Iterable[Scored], case: Iterable[Scored]) -> Lengths | None:
    """Change of the answers' lengths; None if no turn generated tokens under both."""
    before, after = _output_tokens(full), _output_tokens(case)
    turns = sorted(before.keys() & after.keys())
    if not turns:
        return None
    mine = np.array([after[turn] for turn in turns], dtype=float)
    theirs = np.array([before[turn] for turn in turns], dtype=float)
    return Lengths(
        n=len(turns),
        mean=float(mine.mean()),
        full=float(theirs.mean()),
        change=float((mine - theirs).mean()),
        quantiles=tuple(float(value) for value in np.quantile(mine - theirs, QUANTILES)),
    )


def kept(scored: Iterable[Scored]) -> Kept:
    """Measured keep ratios of one case; a turn with several metrics counts once."""
    turns = {(s.task, s.sample, s.turn): s.keep_measured for s in scored}
    said = [value for value in turns.values() if value is not None]
    if not said:
        return Kept(0, len(turns), None, None, None)
    return Kept(len(said), len(turns) - len(said), float(np.mean(said)), min(said), max(said))


def cuts(scored: Iterable[Scored]) -> tuple[Cut, ...]:
    """What was cut, per task. A turn cut differently under different cases counts as its most."""
    prompts: dict[str, dict[tuple[str, int], tuple[int, int]]] = {}
    for s in scored:
        turns = prompts.setdefault(s.task, {})
        turn = (s.sample, s.turn)
        turns[turn] = max(turns.get(turn, (0, 0)), (s.cut_tokens, s.prompt_tokens))
    found = []
    for task in sorted(prompts):
        shortened = [cut for cut, _ in prompts[task].values() if cut]
        found.append(
            Cut(
                task=task,
                turns=len(prompts[task]),
                cut=len(shortened),
                mean=float(np.mean(shortened)) if shortened else 0.0,
                most=max(shortened, default=0),
                prompt=float(np.mean([prompt for _, prompt in prompts[task].values()])),
            )
        )
    return tuple(found)


def _verdicts(scored: Iterable[Scored]) -> Mapping[Question, float]:
    return {(s.task, s.sample, s.turn, s.metric): s.value for s in scored if s.higher_is_better}


def _output_tokens(scored: Iterable[Scored]) -> dict[tuple[str, str, int], int]:
    # Likelihood turns generate nothing.
    return {(s.task, s.sample, s.turn): s.output_tokens for s in scored if s.output_tokens}
