"""What heads need: measured as defined, interpolated, and dealt without losing a sub-block."""

from __future__ import annotations

import math
import random

import pytest
import torch

from uncomp.importance import KEEPS, Importance, deal, in_order, looked_up, shares_of


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_looked_up_is_the_largest_attention_of_the_second_reading(
    group: int, softcap: float
) -> None:
    torch.manual_seed(0)
    heads, tokens, first, size = 2, 23, 9, 6
    queries = torch.randn(heads, group, tokens, size, dtype=torch.float64)
    keys = torch.randn(heads, tokens, size, dtype=torch.float64)
    found = looked_up(queries, keys, first, 0.4, softcap)
    assert found.shape == (heads, first)
    for h in range(heads):
        for entry in range(first):
            most = 0.0
            for g in range(group):
                for q in range(first, tokens):
                    logits = [float(queries[h, g, q] @ keys[h, k]) * 0.4 for k in range(q + 1)]
                    if softcap:
                        logits = [softcap * math.tanh(x / softcap) for x in logits]
                    total = sum(math.exp(x) for x in logits)
                    most = max(most, math.exp(logits[entry]) / total)
            assert found[h, entry].item() == pytest.approx(most, rel=1e-9)


def test_shares_are_counts_of_the_best_of_all() -> None:
    torch.manual_seed(1)
    scores = torch.rand(3, 2, 40)
    shares = shares_of(scores, (0.1, 0.5, 1.0))
    ranked = sorted(scores.flatten().tolist(), reverse=True)
    for keep, table in zip((0.1, 0.5, 1.0), shares, strict=True):
        least = ranked[round(keep * 240) - 1]
        assert table.tolist() == ((scores >= least).sum(-1).double() / 40).tolist()
        assert table.mean().item() == pytest.approx(keep)


def test_between_measured_ratios_shares_are_linear() -> None:
    shares = torch.tensor([[[0.1, 0.4]], [[0.6, 0.4]]], dtype=torch.float64)
    importance = Importance((0.25, 0.5), shares)
    at = {
        0.25: [0.1, 0.4],
        0.375: [0.35, 0.4],
        0.5: [0.6, 0.4],
        0.75: [0.8, 0.7],
        1.0: [1.0, 1.0],
        0.125: [0.05, 0.2],  # below: the lowest in proportion
    }
    for keep, wanted in at.items():
        assert importance.at(keep)[0].tolist() == pytest.approx(wanted)


def test_part_takes_layers_and_heads() -> None:
    shares = torch.rand(len(KEEPS), 5, 4, dtype=torch.float64)
    part = Importance(KEEPS, shares).part([1, 3], slice(2, 4))
    assert torch.equal(part.shares, shares[:, [1, 3], 2:4])


@pytest.mark.parametrize("seed", range(20))
def test_dealing_loses_nothing_and_keeps_the_bounds(seed: int) -> None:
    rng = random.Random(seed)
    layers, heads = rng.randint(1, 6), rng.randint(1, 4)
    shares = torch.rand(len(KEEPS), layers, heads, dtype=torch.float64) ** 4
    least = torch.randint(0, 3, (layers, heads))
    most = least + torch.randint(0, 30, (layers, heads))
    total = rng.randint(int(least.sum()), int(most.sum()) + 5)
    floor = rng.choice([0.0, 0.2, 1.0])
    counts = deal(Importance(KEEPS, shares), total, least, most, floor)
    assert int(counts.sum()) == min(total, int(most.sum()))
    assert bool(((counts >= least) & (counts <= most)).all())


def test_a_floor_leaves_nobody_without() -> None:
    shares = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    least, most = torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 100)
    importance = Importance((0.25,), shares)
    assert deal(importance, 100, least, most, 0.0).tolist() == [[100, 0], [0, 0]]
    assert deal(importance, 100, least, most, 0.2).tolist() == [[85, 5], [5, 5]]
    assert deal(importance, 100, least, most, 1.0).tolist() == [[25, 25], [25, 25]]


def test_minima_beyond_the_total_are_an_error() -> None:
    least = torch.full((2, 2), 3)
    importance = Importance((0.25,), torch.ones(1, 2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="are to be dealt"):
        deal(importance, 11, least, least + 1, 0.2)


def test_layers_in_ascending_order_stay_as_they_are() -> None:
    counts = torch.tensor([[1, 0], [1, 2], [2, 2], [5, 3]])
    zeros, most = torch.zeros_like(counts), torch.full_like(counts, 9)
    assert torch.equal(in_order(counts, 4, zeros, most), counts)


def test_a_rich_layer_gives_to_those_after_it() -> None:
    counts = torch.tensor([[4, 2], [1, 0], [0, 1], [2, 2]])
    least, most = torch.zeros_like(counts), torch.full_like(counts, 5)
    # Three to a layer: the first gives three of six, the next take what fits.
    found = in_order(counts, 3, least, most)
    assert found.sum(1).tolist() == [3, 3, 2, 4]
    assert found[0].tolist() == [2, 1]
    assert torch.equal(found[3], counts[3])


@pytest.mark.parametrize("seed", range(30))
def test_order_keeps_bounds_and_sum(seed: int) -> None:
    rng = random.Random(seed)
    layers, heads, full = rng.randint(1, 7), rng.randint(1, 4), rng.randint(4, 40)
    kept = rng.randint(2, full)
    least = torch.randint(0, 3, (layers, heads))
    most = torch.full((layers, heads), full)
    shares = torch.rand(len(KEEPS), layers, heads, dtype=torch.float64) ** 4
    needs = Importance(KEEPS, shares)
    counts = deal(needs, kept * heads * layers, least, most, rng.choice([0.0, 0.5]))
    found = in_order(counts, kept * heads, least, most)
    assert bool(((found >= least) & (found <= most)).all())
    room = torch.arange(1, layers + 1) * kept * heads
    assert bool((found.sum(1).cumsum(0) <= room).all())
    assert int(found.sum()) == int(counts.sum())
    ranked = counts[counts.sum(1).argsort()]
    assert torch.equal(in_order(ranked, kept * heads, least, most), ranked)


def test_a_layer_that_cannot_hold_its_minimum_is_an_error() -> None:
    counts = torch.tensor([[3, 3]])
    with pytest.raises(ValueError, match="need up to 6 sub-blocks of 4"):
        in_order(counts, 4, counts, counts)
