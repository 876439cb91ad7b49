"""Intervals, differences and changes: by hand, against scipy and by simulation."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy")
from scipy.stats import bootstrap, norm

from uncomp.eval.report.regressions import cuts, flips, kept, lengths
from uncomp.eval.report.stats import (
    CONFIDENCE,
    SEED,
    Values,
    difference,
    estimate,
    interval,
    sign_test,
)
from uncomp.eval.run.records import Case, Scored

FULL, SNAP, OURS = Case("full"), Case("snapkv", 0.25), Case("uncomp", 0.25)


def values(*numbers: float) -> Values:
    """One turn per sample."""
    return {f"s{index:03}": {0: number} for index, number in enumerate(numbers)}


def answer(
    task: str, sample: str, case: Case, value: float, metric: str = "match", **more: Any
) -> Scored:
    return Scored(task, sample, 0, case, metric, value, **more)


def test_mean_of_task_means_not_of_samples() -> None:
    found = estimate([values(1, 1, 1, 1, 1, 1), values(0, 0)])
    assert (found.mean, found.n, found.tasks) == (0.5, 8, 2)


def test_turns_of_a_sample_are_averaged_first() -> None:
    # by turns it would be 3 / 5, by first turns 0
    found = estimate([{"a": {0: 0.0, 1: 1.0, 2: 1.0, 3: 1.0}, "b": {0: 0.0}}])
    assert (found.mean, found.n, found.turns) == (0.375, 2, 5)


def test_samples_are_resampled_not_turns() -> None:
    """Copies of a turn carry no information: the interval stays that of the samples."""
    once = {f"s{i}": {0: float(i % 3 == 0)} for i in range(12)}
    copied = {name: {turn: value[0] for turn in range(10)} for name, value in once.items()}
    assert estimate([copied]).interval == estimate([once]).interval


def test_difference_by_hand() -> None:
    case, reference = values(1, 0, 1, 0, 0), values(0, 0, 1, 1, 1)
    found = difference([(case, reference)])
    assert found
    assert (found.mean, found.reference) == (pytest.approx(0.4), pytest.approx(0.6))
    assert found.difference == pytest.approx(-0.2)
    assert (found.above, found.below) == (1, 2)
    assert found.p_sign == 1.0  # 3 throws: P(at most 1 head) = 1/2, two sides
    assert found.interval.low <= -0.2 <= found.interval.high


@pytest.mark.parametrize(
    ("above", "below", "p"), [(0, 0, 1), (5, 0, 2 / 32), (1, 9, 22 / 1024), (3, 3, 1)]
)
def test_sign_test_by_hand(above: int, below: int, p: float) -> None:
    assert sign_test(above, below) == pytest.approx(p)


def test_percentile_interval_of_two_by_enumeration() -> None:
    """Means of all four resamples of (0, 1): 0, 1/2, 1/2, 1; each end has a quarter of them."""
    resamples = [np.mean(pick) for pick in itertools.product((0.0, 1.0), repeat=2)]
    found = interval([np.array([0.0, 1.0])])
    assert (found.low, found.high) == (min(resamples), max(resamples))


def test_paired_difference_is_scipys_paired_bootstrap() -> None:
    rng = np.random.default_rng(3)
    case = rng.beta(2, 3, 60)
    reference = np.clip(case + rng.normal(0.05, 0.1, 60), 0, 1)
    found = difference([(values(*case), values(*reference))], resamples=2000)
    asked = bootstrap(
        (case, reference),
        lambda x, y, axis=-1: x.mean(axis=axis) - y.mean(axis=axis),
        paired=True,
        vectorized=True,
        method="BCa",
        confidence_level=CONFIDENCE,
        n_resamples=2000,
        batch=1000,
        random_state=np.random.default_rng(SEED),
    ).confidence_interval
    assert found
    assert found.interval.how == "BCa"
    # the same resamples of the same samples; the sums are in another order
    assert found.interval.low == pytest.approx(asked.low, abs=1e-9)
    assert found.interval.high == pytest.approx(asked.high, abs=1e-9)


def test_pairing_narrows_the_interval() -> None:
    rng = np.random.default_rng(5)
    hard = rng.random(80)
    found = difference([(values(*(hard + 0.01 * rng.random(80))), values(*hard))])
    apart = interval([hard])
    assert found
    assert found.interval.high - found.interval.low < 0.05 * (apart.high - apart.low)


def test_strata_are_resampled_within_themselves() -> None:
    """Between-task spread is no error of a mean over these tasks: both constant, no width."""
    found = interval([np.zeros(10), np.ones(10)])
    assert (found.low, found.high, found.how) == (0.5, 0.5, "all equal")


def test_stratified_width_is_the_standard_error() -> None:
    """Half width = z * sqrt(sum of squared errors of the task means) / tasks, about."""
    rng = np.random.default_rng(7)
    strata = [rng.normal(i, 0.2, size) for i, size in enumerate((200, 100, 50))]
    found = interval(strata)
    error = math.sqrt(sum(s.var() / len(s) for s in strata)) / 3
    # 4 % of the error from 4999 replicates at each end, the rest from skewness; without strata
    # the interval would be more than five times as wide
    assert (found.high - found.low) / 2 == pytest.approx(norm.ppf(0.975) * error, rel=0.1)


def test_order_and_repetition_change_nothing() -> None:
    numbers = dict(values(*np.random.default_rng(1).random(30)))
    turned = dict(reversed(numbers.items()))
    assert estimate([numbers]) == estimate([turned])


@pytest.mark.parametrize(
    ("pair", "how"),
    [
        ((values(1), values(0)), "one sample"),
        ((values(1, 1, 1), values(0, 0, 0)), "all equal"),
        ((values(0.1 + 0.2, 0.5), values(0.3, 0.5)), "all equal"),
    ],
    ids=["one sample", "all differ alike", "rounding is no difference"],
)
def test_degenerate_differences_say_so(pair: tuple[Values, Values], how: str) -> None:
    found = difference([pair])
    assert found
    assert found.interval.how == how
    assert (found.interval.low is None) == (how == "one sample")


def test_rounding_is_neither_above_nor_below() -> None:
    found = difference([(values(0.1 + 0.2, 0.5), values(0.3, 0.5))])
    assert found
    assert (found.above, found.below, found.p_sign) == (0, 0, 1.0)


def test_percentile_where_bca_is_not_defined(monkeypatch: pytest.MonkeyPatch) -> None:
    from uncomp.eval.report import stats

    real = stats._bootstrap

    def without_bca(strata: object, method: str, resamples: int) -> tuple[float, float]:
        if method == "BCa":
            return math.nan, math.nan
        return real(strata, method, resamples)  # type: ignore[arg-type]

    monkeypatch.setattr(stats, "_bootstrap", without_bca)
    found = interval([np.array([0.0, 0.0, 1.0, 1.0, 0.5])])
    assert found.how == "percentile"
    assert found.low < 0.5 < found.high


def test_what_has_no_partner_is_counted() -> None:
    case: Values = {"a": {0: 1.0, 1: 0.0}, "b": {0: 1.0}, "mine": {0: 1.0, 1: 1.0}}
    reference: Values = {"a": {0: 0.0}, "b": {0: 1.0}, "theirs": {0: 0.0}}
    found = difference([(case, reference)])
    assert found
    assert (found.n, found.only_case, found.only_reference) == (2, 3, 1)
    assert found.difference == 0.5  # turn 0 of a, turn 0 of b


def test_a_task_without_pairs_is_left_out_and_counted() -> None:
    found = difference([(values(1, 0), values(0, 0)), ({}, values(1, 1, 1))])
    assert found
    assert (found.tasks, found.n, found.only_reference) == (1, 2, 3)


def test_nothing_to_compare() -> None:
    assert difference([({"a": {0: 1.0}}, {"b": {0: 1.0}})]) is None
    with pytest.raises(ValueError, match="no sample"):
        estimate([{}])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_must_be_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="s001"):
        estimate([values(0, bad, 1)])


def test_coverage() -> None:
    """95 % intervals of a paired difference of right and wrong hold the truth 90 to 99 % of times.

    200 repeats: a true coverage of 95 % is seen outside of these bounds once in 300.
    """
    rng = np.random.default_rng(11)
    hits = 0
    for _ in range(200):
        before = rng.random(60) < 0.8
        after = before & (rng.random(60) < 0.75)  # loses a quarter: true difference -0.2
        pair = (values(*after.astype(float)), values(*before.astype(float)))
        found = difference([pair], resamples=499)
        assert found
        hits += found.interval.low <= -0.2 <= found.interval.high
    assert 0.90 <= hits / 200 <= 0.99


def test_flips_by_hand() -> None:
    full = [
        answer("a", n, FULL, v) for n, v in zip("uwxyz", (0.5, 1.0, 0.5, 0.4, 0.0), strict=True)
    ]
    case = [
        answer("a", n, OURS, v) for n, v in zip("uwxyv", (0.4, 0.4, 0.5, 0.5, 1.0), strict=True)
    ]
    found = flips(full, case)
    assert found
    assert [f.sample for f in found.lost] == ["u", "w"]
    assert [f.sample for f in found.gained] == ["y"]
    assert (found.compared, found.right_full, found.unpaired) == (4, 3, 2)
    assert flips(full, [dataclasses.replace(case[0], higher_is_better=False)]) is None


def test_lengths_by_hand() -> None:
    full = [answer("a", str(i), FULL, 1.0, output_tokens=10) for i in range(5)]
    case = [answer("a", str(i), OURS, 1.0, output_tokens=10 + i) for i in range(5)]
    forced = [answer("t", "0", c, 1.0, output_tokens=0) for c in (FULL, OURS)]
    found = lengths([*full, forced[0]], [*case, forced[1]])
    assert found
    assert (found.n, found.full, found.mean, found.change) == (5, 10.0, 12.0, 2.0)
    assert found.quantiles == pytest.approx((0.2, 1.0, 2.0, 3.0, 3.8))
    assert lengths(forced[:1], forced[1:]) is None


def test_kept_counts_turns_once_and_says_what_it_was_not_told() -> None:
    told = [answer("a", "s", OURS, 1.0, metric=m, keep_measured=0.3) for m in ("x", "y")]
    scored = [*told, answer("a", "t", OURS, 1.0, keep_measured=0.2)]
    found = kept([*scored, answer("a", "u", OURS, 1.0, keep_measured=None)])
    assert (found.n, found.silent, found.low, found.high) == (2, 1, 0.2, 0.3)
    assert found.mean == pytest.approx(0.25)
    assert kept([answer("a", "u", OURS, 1.0, keep_measured=None)]).mean is None


def test_cuts_count_a_prompt_once() -> None:
    cut = {SNAP: 10, FULL: 30, OURS: 20}  # the most counts
    scored = [answer("a", "s", case, 1.0, cut_tokens=count) for case, count in cut.items()]
    [found] = cuts([*scored, answer("a", "t", FULL, 1.0)])
    assert (found.turns, found.cut, found.mean, found.most) == (2, 1, 30.0, 30)
