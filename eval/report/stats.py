"""How sure a mean or a difference is: bootstrap over samples, and the sign test.

The unit that is resampled is the sample, because the turns of one sample share a document and are
not independent; turns are averaged first (a cluster bootstrap). A mean over several tasks is the
mean of the tasks' means, and samples are resampled within each task, so that every replicate has
the same tasks with the same sizes (a stratified bootstrap). Two cases are compared on the same
samples: a sample's two values are drawn together (a paired bootstrap), which for a difference of
means is the bootstrap of the differences.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 14; the
intervals are scipy's.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
# The end of a 95 % interval then moves by about 4 % of a standard error from seed to seed.
RESAMPLES = 4999
SEED = 0
# Values of [0, 1] are sums of a few float64: smaller differences are rounding.
ROUNDING = 1e-12

Values = Mapping[str, Mapping[int, float]]
"""Values of one task under one case: sample -> turn -> value."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval.

    Attributes:
        low, high: its ends; None if there is none.
        how: ``BCa``; ``percentile`` where BCa is not defined (scipy's acceleration or bias
            correction is not finite); ``all equal`` where the values do not vary, so that the
            interval has no width, which says nothing about samples not seen; ``one sample`` where
            a task has only one and its spread is unknown.
    """

    low: float | None
    high: float | None
    how: str


@dataclass(frozen=True)
class Estimate:
    """The mean of a case.

    Attributes:
        n: samples. turns: answers, n or more. tasks: over how many tasks the mean is taken.
        mean: mean over tasks of the mean over samples of the mean over turns.
        interval: of the mean.
    """

    n: int
    turns: int
    tasks: int
    mean: float
    interval: Interval


@dataclass(frozen=True)
class Difference:
    """A case against a reference, over the answers that both have.

    Attributes:
        n: samples with at least one turn answered under both. tasks: that have such samples.
        mean, reference: of the case and of the reference over these pairs.
        difference: mean minus reference.
        interval: of the difference.
        above, below: samples whose value is above, below the reference's; the others are equal.
        p_sign: two-sided p of the exact sign test on ``above`` and ``below``, samples of all tasks
            pooled; 1 if all are equal. Not corrected for the number of comparisons.
        only_case, only_reference: turns without a partner, which are left out.
    """

    n: int
    tasks: int
    mean: float
    reference: float
    difference: float
    interval: Interval
    above: int
    below: int
    p_sign: float
    only_case: int
    only_reference: int


def estimate(tasks: Sequence[Values], resamples: int = RESAMPLES) -> Estimate:
    """The macro-average over tasks, with its interval.

    Args:
        tasks: values of one case, one entry per task; at least one entry with a sample. Entries
            without samples are left out (``tasks`` of the result says how many are in).
        resamples: bootstrap replicates.

    Raises:
        ValueError: no sample, or a value that is not finite.
    """
    strata = [_sample_means(values) for values in tasks if values]
    if not strata:
        raise ValueError("no sample to average: at least one task must have one")
    return Estimate(
        n=sum(len(stratum) for stratum in strata),
        turns=sum(len(turns) for values in tasks for turns in values.values()),
        tasks=len(strata),
        mean=_macro(strata),
        interval=interval(strata, resamples),
    )


def difference(
    pairs: Sequence[tuple[Values, Values]], resamples: int = RESAMPLES
) -> Difference | None:
    """A case against a reference; None if they share no answer.

    Args:
        pairs: (case, reference) per task.
        resamples: bootstrap replicates.

    Raises:
        ValueError: a value that is not finite.
    """
    cases: list[Array] = []
    references: list[Array] = []
    only_case = only_reference = 0
    for case, reference in pairs:
        shared_case, shared_reference, alone = _shared(case, reference)
        only_case += alone
        only_reference += _count(reference) - _count(shared_reference)
        if shared_case:
            cases.append(_sample_means(shared_case))
            references.append(_sample_means(shared_reference))
    if not cases:
        return None
    differences = [case - reference for case, reference in zip(cases, references, strict=True)]
    pooled = np.concatenate(differences)
    above, below = int((pooled > ROUNDING).sum()), int((pooled < -ROUNDING).sum())
    return Difference(
        n=len(pooled),
        tasks=len(cases),
        mean=_macro(cases),
        reference=_macro(references),
        difference=_macro(differences),
        interval=interval(differences, resamples),
        above=above,
        below=below,
        p_sign=sign_test(above, below),
        only_case=only_case,
        only_reference=only_reference,
    )


def sign_test(above: int, below: int) -> float:
    """Two-sided p of ``above`` heads in ``above + below`` throws of a fair coin; 1 for none."""
    from scipy.stats import binomtest

    if above + below == 0:
        return 1.0
    return float(binomtest(above, above + below, 0.5).pvalue)


def interval(strata: Sequence[Array], resamples: int = RESAMPLES) -> Interval:
    """The interval of the mean of the strata's means, resampled within each stratum.

    Args:
        strata: one array of values per task, none empty; for a paired comparison the differences.
        resamples: bootstrap replicates.
    """
    if any(len(stratum) < 2 for stratum in strata):
        return Interval(None, None, "one sample")
    if all(np.ptp(stratum) <= ROUNDING for stratum in strata):
        middle = _macro(strata)
        return Interval(middle, middle, "all equal")
    for method in ("BCa", "percentile"):
        low, high = _bootstrap(strata, method, resamples)
        if np.isfinite(low) and np.isfinite(high):
            return Interval(low, high, method)
    raise ValueError(f"no interval for values that are not all finite: {strata}")


def _bootstrap(strata: Sequence[Array], method: str, resamples: int) -> tuple[float, float]:
    from scipy.stats import DegenerateDataWarning, bootstrap

    with warnings.catch_warnings():
        # Not defined: the ends are NaN, which the caller answers with the percentile method.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        result = bootstrap(
            tuple(strata),
            _macro_along,
            vectorized=True,
            method=method,
            confidence_level=CONFIDENCE,
            n_resamples=resamples,
            batch=1000,
            random_state=np.random.default_rng(SEED),
        )
    ends = result.confidence_interval
    return float(ends.low), float(ends.high)


def _macro_along(*strata: Array, axis: int = -1) -> Any:
    return sum(stratum.mean(axis=axis) for stratum in strata) / len(strata)


def _macro(strata: Sequence[Array]) -> float:
    return float(np.mean([stratum.mean() for stratum in strata]))


def _sample_means(values: Values) -> Array:
    """One value per sample, in the order of their names, so that input order does not matter."""
    means = np.array([fmean(values[name].values()) for name in sorted(values)])
    if not np.isfinite(means).all():
        bad = [
            name for name, mean in zip(sorted(values), means, strict=True) if not np.isfinite(mean)
        ]
        raise ValueError(f"values must be finite; samples with others: {bad[:5]}")
    return means


def _shared(case: Values, reference: Values) -> tuple[Values, Values, int]:
    """The turns that both have, from each, and how many only the case has."""
    mine: dict[str, dict[int, float]] = {}
    other: dict[str, dict[int, float]] = {}
    for sample in sorted(case.keys() & reference.keys()):
        turns = sorted(case[sample].keys() & reference[sample].keys())
        if turns:
            mine[sample] = {turn: case[sample][turn] for turn in turns}
            other[sample] = {turn: reference[sample][turn] for turn in turns}
    return mine, other, _count(case) - _count(mine)


def _count(values: Values) -> int:
    return sum(len(turns) for turns in values.values())
