"""Head groups: worked numbers, equal sizes, ties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uncomp.grouping import groups

quick = settings(deadline=None, max_examples=100)

# Entropies of the four heads of the worked example.
K2_RAW = [0.0, 0.6931471806, 0.7339712073, 0.2385946588]
K4 = [0.0, 1.3862943611, 1.3011429739, 0.3829421780]
K2_RENORMALIZED = [0.0, 0.6931471806, 0.6919884152, 0.2096694280]

ORACLE = [
    pytest.param(K2_RAW, 2, [0, 1, 1, 0], id="M2-k2-raw"),
    pytest.param(K4, 2, [0, 1, 1, 0], id="M2-k4"),
    pytest.param(K2_RENORMALIZED, 2, [0, 1, 1, 0], id="M2-k2-renormalized"),
    pytest.param(K2_RAW, 4, [0, 2, 3, 1], id="M4-k2-raw"),
    pytest.param(K4, 4, [0, 3, 2, 1], id="M4-k4"),
    pytest.param(K2_RENORMALIZED, 4, [0, 3, 2, 1], id="M4-k2-renormalized"),
]


@pytest.mark.parametrize(("entropies", "count", "expected"), ORACLE)
def test_oracle_groups(entropies, count, expected):
    assert groups(torch.tensor(entropies), count).tolist() == expected


def test_oracle_groups_of_32_heads():
    entropies = [((7 * h * h + 3 * h) % 32) / 32 + h / 1000 for h in range(32)]
    expected = "0 2 0 2 7 7 3 3 6 4 6 4 5 1 1 5 4 6 4 6 3 3 7 7 2 0 2 0 1 5 5 1"
    result = groups(torch.tensor(entropies, dtype=torch.float64), 8)
    assert result.tolist() == [int(group) for group in expected.split()]


def test_oracle_vote():
    votes = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]]).sum(0)
    assert votes.tolist() == [3, 2, 1, 0]
    assert groups(votes.double(), 2).tolist() == [1, 1, 0, 0]


@quick
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 12))
def test_groups_are_equal_ordered_and_tie_to_the_lower_head(values, count):
    result = groups(torch.tensor(values, dtype=torch.float64), count).tolist()
    ranked = sorted(range(len(values)), key=lambda head: (values[head], head))
    assert [result[head] for head in ranked] == [
        rank * count // len(values) for rank in range(len(values))
    ]
    sizes = [result.count(group) for group in range(count)]
    assert max(sizes) - min(sizes) <= 1


def test_one_group_and_one_head():
    assert groups(torch.rand(5), 1).tolist() == [0] * 5
    assert groups(torch.rand(1), 8).tolist() == [0]
    assert groups(torch.empty(0), 2).tolist() == []


def test_errors_name_what_was_given():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        groups(torch.rand(4), 0)
    with pytest.raises(ValueError, match="H"):
        groups(torch.tensor(0.5), 2)
    with pytest.raises(ValueError, match="NaN"):
        groups(torch.tensor([0.0, float("nan")]), 2)


def test_many_layers_at_once():
    entropies = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.1, 0.1, 0.9, 0.1]])
    expected = [groups(layer, 2).tolist() for layer in entropies]
    assert groups(entropies, 2).tolist() == expected == [[1, 0, 1, 0], [0, 0, 1, 1]]
