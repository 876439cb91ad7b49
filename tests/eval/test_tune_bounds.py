"""Bounds of a loss: published and hand values, and how often they are wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, norm, ttest_1samp

from uncomp.eval.tune.bounds import (
    FEW,
    SIGNS,
    STUDENT,
    TANGO,
    bounds,
    samples_needed,
    tango,
)


def pairs(lost: int, won: int, n: int) -> tuple[list[float], list[float]]:
    """Scores of 0 and 1 with so many pairs of each kind."""
    same = [1.0] * (n - lost - won)
    return [1.0] * lost + [0.0] * won + same, [0.0] * lost + [1.0] * won + same


def test_published_interval() -> None:
    """Airway reactivity before and after transplantation, 1 and 7 of 21 pairs differ (Bentur et
    al. 2009); Tango's 95 % interval in Fagerland, Lydersen and Laake, Statistical Analysis of
    Contingency Tables (2017), chapter 8: -0.517 to -0.026."""
    found = bounds(*pairs(1, 7, 21), 0.025)
    assert found.how == TANGO
    assert (round(found.lower, 3), round(found.upper, 3)) == (-0.517, -0.026)
    assert found.mean == pytest.approx(-6 / 21)


@pytest.mark.parametrize("n", [20, 200])
def test_nothing_flipped_is_not_no_loss(n: int) -> None:
    """z²/(n + z²), which the score equation gives by hand for two empty cells."""
    found = bounds(*pairs(0, 0, n), 0.05)
    square = norm.isf(0.05) ** 2
    assert found.upper == pytest.approx(square / (n + square), rel=1e-9)
    assert found.lower == pytest.approx(-found.upper)
    assert found.mean == 0


def test_all_lost_and_all_won() -> None:
    assert bounds(*pairs(5, 0, 5), 0.05).upper == 1
    assert bounds(*pairs(0, 5, 5), 0.05).lower == -1
    assert 0 < bounds(*pairs(5, 0, 5), 0.05).lower < 1


def test_samples_needed_is_the_least() -> None:
    """Where nothing flips, one sample less does not show it. Rule of thumb: 2.7 / loss."""
    for loss, alpha in ((0.01, 0.05), (0.01, 0.01), (0.05, 0.05)):
        n = samples_needed(loss, alpha)
        assert tango(0, 0, n, alpha) < loss
        assert tango(0, 0, n - 1, alpha) >= loss
    assert samples_needed(0.01, 0.05) == 268


def miss(upper: list[float], n: int, loss: float) -> float:
    """How often a bound is below the truth, where samples lose with this chance and none wins."""
    return math.fsum(binom.pmf(lost, n, loss) for lost in range(len(upper)) if upper[lost] < loss)


def test_one_sided_coverage_where_only_losses_happen() -> None:
    """Summed over all outcomes, not simulated. Nominal: 5 %. The adjusted Wald bound (Agresti and
    Min 2005) is why Tango's is used."""
    n, z = 200, float(norm.isf(0.05))
    lost = range(40)
    score = [tango(b, 0, n, 0.05) for b in lost]
    wald = [(b + z * math.sqrt(b + 1 - b * b / (n + 2))) / (n + 2) for b in lost]
    losses = np.linspace(0.005, 0.05, 91)
    assert max(miss(score, n, loss) for loss in losses) < 0.07
    assert max(miss(wald, n, loss) for loss in losses) > 0.17


def test_student() -> None:
    rng = np.random.default_rng(0)
    full = list(rng.uniform(0.5, 1, 30))
    own = [max(0.0, score - float(rng.uniform(0, 0.1))) for score in full]
    found = bounds(full, own, 0.05)
    test = ttest_1samp(np.subtract(full, own), 0.0)
    low, high = test.confidence_interval(0.9)
    assert found.how == STUDENT
    assert (found.lower, found.upper) == pytest.approx((low, high))


def test_few_differences_are_no_spread_to_trust() -> None:
    """Student's t of ninety-nine zeros and a loss of 0.3 is half of what may be true."""
    own = [0.6] + [0.9] * 99
    found = bounds([0.9] * 100, own, 0.05)
    assert found.how == SIGNS
    assert found.upper == pytest.approx(0.3 * tango(1, 0, 100, 0.05))
    assert found.lower == pytest.approx(-0.3 * tango(0, 0, 100, 0.05))
    same = bounds([0.9] * 100, [0.9] * 100, 0.05)
    assert (same.how, same.upper) == (SIGNS, pytest.approx(tango(0, 0, 100, 0.05)))
    assert bounds([0.9] * 100, [0.8] * FEW + [0.9] * (100 - FEW), 0.05).how == STUDENT


@pytest.mark.parametrize(("share", "size"), [(0.02, 0.5), (0.1, 0.2), (1.0, 0.05)])
def test_coverage_of_scores_between(share: float, size: float) -> None:
    """A share of the samples loses up to twice ``size``. 5 % of the bounds may be wrong; skewed
    losses make Student's t miss more, which is what 9 % allows for."""
    rng = np.random.default_rng(1)
    wrong, repeats = 0, 1000
    for _ in range(repeats):
        loss = rng.uniform(0, 2 * size, 100) * (rng.random(100) < share)
        full = np.full(100, 1.0)
        wrong += bounds(list(full), list(full - loss), 0.05).upper < share * size
    assert wrong / repeats < 0.09


def test_what_cannot_be_bounded() -> None:
    for full, own, alpha in (([], [], 0.05), ([1.0], [], 0.05), ([1.0], [1.5], 0.05)):
        with pytest.raises(ValueError, match="scores"):
            bounds(full, own, alpha)
    with pytest.raises(ValueError, match=r"alpha=0\.7"):
        bounds([1.0], [1.0], 0.7)
