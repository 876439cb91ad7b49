"""Budgets: published tables, exact means, dealing that loses nothing."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from uncomp.budget import (
    V1_BUDGETS,
    V2_BUDGETS,
    deal,
    group_shares,
    halved,
    linear_step,
    mean_linear,
)

quick = settings(deadline=None, max_examples=300)


def test_oracle_published_tables():
    assert list(V1_BUDGETS) == halved(512) == [256, 512]
    assert halved(86) == [43, 86]
    assert list(V2_BUDGETS) == [122, 196, 270, 344, 418, 492, 566, 640]
    assert linear_step(640, 74, 8) == list(V2_BUDGETS)
    assert sum(V2_BUDGETS) / 8 == 381


@pytest.mark.parametrize(
    ("mean", "groups", "ratio", "expected"),
    [
        (384, 8, 5, [128, 201, 274, 347, 420, 494, 567, 641]),
        (384, 2, 2, [256, 512]),
        (384, 4, 2, [256, 341, 426, 513]),
        (64, 2, 7, [16, 112]),
        (384, 1, 5, [384]),
        (0, 3, 2, [0, 0, 0]),
    ],
)
def test_oracle_mean_linear(mean, groups, ratio, expected):
    assert mean_linear(mean, groups, ratio) == expected


@quick
@given(st.integers(0, 100_000), st.integers(1, 64), st.floats(1, 1000))
def test_mean_linear_keeps_the_mean_exactly_and_ascends(mean, groups, ratio):
    result = mean_linear(mean, groups, ratio)
    assert sum(result) == mean * groups
    assert result == sorted(result)
    assert min(result) >= 0


@quick
@given(st.integers(1, 64), st.floats(1, 1000))
def test_group_shares_have_mean_one_and_the_ratio(groups, ratio):
    shares = group_shares(groups, ratio)
    assert sum(shares) == pytest.approx(groups)
    if groups > 1:
        assert shares[-1] / shares[0] == pytest.approx(ratio)


def run(weights, total, minimum, maximum) -> list[int]:
    return deal(
        torch.tensor(weights, dtype=torch.float64),
        total,
        torch.tensor(minimum, dtype=torch.int64),
        torch.tensor(maximum, dtype=torch.int64),
    ).tolist()


@pytest.mark.parametrize(
    ("weights", "total", "minimum", "maximum", "expected"),
    [
        pytest.param([1, 1, 1], 9, [0] * 3, [9] * 3, [3, 3, 3], id="even"),
        pytest.param([1, 1, 1], 8, [0] * 3, [9] * 3, [3, 3, 2], id="tie-to-the-lower-head"),
        pytest.param([2, 4], 12, [0, 0], [99, 99], [4, 8], id="proportional"),
        pytest.param([1, 1, 3], 10, [0] * 3, [99, 99, 4], [3, 3, 4], id="maximum-moves-down"),
        pytest.param([1, 1, 3], 10, [4, 0, 0], [99] * 3, [4, 2, 4], id="minimum-takes"),
        pytest.param([5, 1, 1], 20, [0, 0, 0], [6, 8, 99], [6, 7, 7], id="one-maximum"),
        pytest.param([5, 4, 1], 20, [0, 0, 0], [6, 8, 99], [6, 8, 6], id="maximum-after-maximum"),
        pytest.param([1, 1], 99, [0, 0], [3, 4], [3, 4], id="more-than-fits"),
        pytest.param([0, 0, 0], 7, [0] * 3, [9] * 3, [3, 2, 2], id="zero-weights-are-equal"),
        pytest.param([0, 1, 0], 7, [0] * 3, [9, 3, 9], [2, 3, 2], id="rest-to-zero-weights"),
        pytest.param([1, 2], 5, [2, 3], [9, 9], [2, 3], id="nothing-to-spare"),
        pytest.param([0.1, 0.2, 0.7], 10, [0] * 3, [9] * 3, [1, 2, 7], id="no-rounding-noise"),
        pytest.param([1], 5, [1], [9], [5], id="one-head"),
        pytest.param([], 5, [], [], [], id="no-heads"),
        pytest.param([1e-300, 1e300], 4, [1, 1], [9, 9], [1, 3], id="extreme-weights"),
    ],
)
def test_dealing_examples(weights, total, minimum, maximum, expected):
    assert run(weights, total, minimum, maximum) == expected


heads = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 5).map(float), st.floats(0, 1e6)),
        st.integers(0, 20),
        st.integers(0, 60),
    ),
    min_size=1,
    max_size=16,
)


@quick
@given(heads, st.integers(0, 600))
def test_dealing_is_exact_and_within_bounds(rows, extra):
    weights = [w for w, _, _ in rows]
    minimum = [low for _, low, _ in rows]
    maximum = [low + room for _, low, room in rows]
    total = sum(minimum) + extra
    result = run(weights, total, minimum, maximum)
    assert sum(result) == min(total, sum(maximum))
    assert all(low <= got <= high for low, got, high in zip(minimum, result, maximum, strict=True))


@quick
@given(heads, st.integers(0, 600))
def test_dealing_is_proportional_between_the_bounds(rows, extra):
    weights = [max(w, 1e-3) for w, _, _ in rows]
    minimum = [low for _, low, _ in rows]
    maximum = [low + room for _, low, room in rows]
    result = run(weights, sum(minimum) + extra, minimum, maximum)
    inside = [
        head for head in range(len(rows)) if minimum[head] + 1 < result[head] < maximum[head] - 1
    ]
    for a in inside:  # heads no bound touches share one ratio, up to rounding by less than one
        for b in inside:
            assert (result[a] - 1) / weights[a] <= (result[b] + 1) / weights[b] + 1e-9


@quick
@given(st.lists(st.integers(1, 9), min_size=2, max_size=12), st.integers(0, 400))
def test_larger_weight_never_gets_less(weights, total):
    result = run(weights, total, [0] * len(weights), [400] * len(weights))
    for a, b in zip(range(len(weights)), range(1, len(weights)), strict=False):
        if weights[a] > weights[b]:
            assert result[a] >= result[b]
        if weights[a] == weights[b]:
            assert result[b] <= result[a] <= result[b] + 1


@quick
@given(heads, st.integers(1, 200))
def test_dealing_only_depends_on_weight_ratios(rows, total):
    assume(any(w > 0 for w, _, _ in rows))
    weights = [w for w, _, _ in rows]
    open_bounds = [0] * len(rows), [1000] * len(rows)
    doubled = [2 * w for w in weights]
    assert run(weights, total, *open_bounds) == run(doubled, total, *open_bounds)


def test_errors_name_what_was_given():
    with pytest.raises(ValueError, match=r"\[3, 3\] need 6 but only 5"):
        run([1, 1], 5, [3, 3], [9, 9])
    with pytest.raises(ValueError, match=r"minimum <= maximum, got \[3, 0\] and \[2, 9\]"):
        run([1, 1], 5, [3, 0], [2, 9])
    with pytest.raises(ValueError, match=r">= 0, got \[1.0, -1.0\]"):
        run([1, -1], 5, [0, 0], [9, 9])
    with pytest.raises(ValueError, match="nan"):
        run([1, float("nan")], 5, [0, 0], [9, 9])
    with pytest.raises(ValueError, match=r"\(1,\), \(2,\)"):
        run([1, 1], 5, [0], [9, 9])
    with pytest.raises(ValueError, match=r"ratio top / bottom must be finite and >= 1, got 0\.5"):
        mean_linear(384, 2, 0.5)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        group_shares(0, 2)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        mean_linear(-1, 2, 2)
    with pytest.raises(ValueError, match="step=74"):
        linear_step(100, 74, 8)


@quick
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 5))
def test_dealing_many_at_once_is_dealing_each(seed, count, rows):
    random = torch.Generator().manual_seed(seed)
    weights = torch.rand(rows, 2, count, generator=random, dtype=torch.float64)
    weights *= torch.rand(rows, 2, 1, generator=random) < 0.9  # some rows without any weight
    minimum = torch.randint(0, 5, (rows, 2, count), generator=random)
    maximum = minimum + torch.randint(0, 30, (rows, 2, count), generator=random)
    total = minimum.sum(-1) + torch.randint(0, 60, (rows, 2), generator=random)
    result = deal(weights, total, minimum, maximum)
    for i in range(rows):
        for j in range(2):
            alone = deal(weights[i, j], int(total[i, j]), minimum[i, j], maximum[i, j])
            assert torch.equal(result[i, j], alone)
