"""How sure a loss is: one-sided confidence bounds of a mean of paired differences.

A loss is the full cache's score less the setting's, sample by sample, averaged. Each end is a bound
of its own: the true mean is above ``upper`` with probability ``alpha`` at most (to the accuracy of
the method), and below ``lower`` likewise.

Scores that are all 0 or 1
    Tango's score bound for matched pairs (Statistics in Medicine 17, 1998, 891-908).
    Nothing flipped in n samples gives ``z² / (n + z²)``, not 0. The adjusted Wald interval (Agresti
    and Min, Statistics in Medicine 24, 2005, 729-740) would give ``z / (n + 2)``, but that is made
    for two sides: one-sided, where only losses happen, it is below the truth up to 18 % of the time
    instead of 5 % (n = 200; Tango: 7 %; ``tests/eval/test_tune_bounds.py`` adds it up exactly).

Other scores
    Student's t where at least :data:`FEW` samples differ. With fewer, a t bound is made of next to
    no information (of none at all it would be 0): then the share of samples that lose something is
    bounded as above and multiplied with the largest difference seen (1 if none). Gains of other
    samples are not set against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

TANGO = "score (Tango)"
STUDENT = "Student's t"
SIGNS = "score (Tango) of losing samples x largest difference"
#: samples that must differ for Student's t (a rule of thumb)
FEW = 10
#: differences of scores below this are rounding
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Bounds:
    """A mean loss and how far it can be trusted, as shares (0.01 is one point).

    Attributes:
        mean: of the paired differences; positive where the setting scores less.
        lower, upper: one-sided bounds at the same level each.
        n: samples.
        how: the method, one of :data:`TANGO`, :data:`STUDENT`, :data:`SIGNS`.
    """

    mean: float
    lower: float
    upper: float
    n: int
    how: str


def bounds(full: Sequence[float], own: Sequence[float], alpha: float) -> Bounds:
    """Bounds of the mean of ``full - own``.

    Args:
        full, own: scores in [0, 1] of the same samples, in the same order.
        alpha: probability that one bound may be wrong, in (0, 0.5).

    Raises:
        ValueError: no samples, lengths that differ, scores outside [0, 1], or a bad ``alpha``.
    """
    if not full or len(full) != len(own):
        raise ValueError(f"paired scores are needed, got {len(full)} and {len(own)}")
    if not all(0 <= score <= 1 for score in (*full, *own)):
        raise ValueError("scores must be in [0, 1]")
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha={alpha}: must be in (0, 0.5)")
    differences = [a - b for a, b in zip(full, own, strict=True)]
    n, mean = len(differences), math.fsum(differences) / len(differences)
    lost = sum(d > _ROUNDING for d in differences)
    won = sum(d < -_ROUNDING for d in differences)
    if {*full, *own} <= {0, 1}:
        return Bounds(mean, -tango(won, lost, n, alpha), tango(lost, won, n, alpha), n, TANGO)
    if lost + won >= FEW:
        return Bounds(mean, *_student(differences, mean, alpha), n, STUDENT)
    largest = max(map(abs, differences)) if lost + won else 1.0
    ends = (-largest * tango(won, 0, n, alpha), largest * tango(lost, 0, n, alpha))
    return Bounds(mean, *ends, n, SIGNS)


def tango(lost: int, won: int, n: int, alpha: float) -> float:
    """Tango's upper bound of the share lost less the share won.

    It is the largest difference that a score test at level ``alpha`` does not reject.

    Args:
        lost, won: pairs 1-0 and 0-1. n: all pairs.
        alpha: level of the one-sided bound.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    if lost == n:
        return 1.0
    z = float(norm.isf(alpha))
    return float(
        brentq(lambda delta: _statistic(lost, won, n, delta) + z, (lost - won) / n, 1 - 1e-12)
    )


def _statistic(lost: int, won: int, n: int, delta: float) -> float:
    """The score statistic for a true difference ``delta`` (Tango 1998)."""
    b = -lost - won + (2 * n - lost + won) * delta
    c = -won * delta * (1 - delta)
    # The most likely share of 0-1 pairs if the difference is delta.
    share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = n * (2 * share + delta * (1 - delta))
    if variance <= 0:
        return 0.0
    return (lost - won - n * delta) / math.sqrt(variance)


def _student(differences: Sequence[float], mean: float, alpha: float) -> tuple[float, float]:
    from scipy.stats import t

    n = len(differences)
    variance = math.fsum((d - mean) ** 2 for d in differences) / (n - 1)
    half = float(t.isf(alpha, n - 1)) * math.sqrt(variance / n)
    return mean - half, mean + half


def samples_needed(loss: float, alpha: float) -> int:
    """Samples with scores of 0 or 1 for a bound below ``loss`` if not one of them changes.

    ``z² / (n + z²) < loss`` solved for n.

    Args:
        loss: share, in (0, 1). alpha: level of the one-sided bound.
    """
    from scipy.stats import norm

    square = float(norm.isf(alpha)) ** 2
    return math.floor(square * (1 - loss) / loss) + 1
