"""Sub-blocks of layers that share, and caches that lie in one piece of memory."""

from __future__ import annotations

import random

import pytest
import torch

from uncomp.engine.moving import assign, by_head, own_sub_blocks
from uncomp.engine.one_piece import in_one_piece


def test_a_layer_has_its_share_of_every_block() -> None:
    own = own_sub_blocks(torch.tensor([5, 2]), 3, torch.tensor([0, 100]))
    assert own.tolist() == [[15, 16, 17, 6, 7, 8], [115, 116, 117, 106, 107, 108]]


@pytest.mark.parametrize("seed", range(10))
def test_every_sub_block_is_dealt_once_and_first_to_its_own_layer(seed: int) -> None:
    rng = random.Random(seed)
    layers, heads, blocks = rng.randint(1, 8), rng.randint(1, 3), rng.randint(1, 6)
    bases = torch.arange(layers) * 1000
    own = own_sub_blocks(torch.tensor(rng.sample(range(1, 300), blocks)), heads, bases)
    counts = torch.zeros(layers, heads, dtype=torch.int64)
    # Every other time all there is, in proportions that make some layers keep more than they have.
    total = own.numel() if seed % 2 else rng.randint(0, own.numel())
    weights = [rng.random() ** 3 for _ in range(layers)]
    for layer in rng.choices(range(layers), weights, k=total):
        counts[layer, rng.randrange(heads)] += 1
    dealt = assign(own, counts)
    flat = torch.cat(dealt).tolist()
    assert len(flat) == len(set(flat)) == int(counts.sum())
    assert set(flat) <= set(own.flatten().tolist())
    for layer, numbers in enumerate(dealt):
        most = min(len(numbers), own.shape[1])
        assert numbers[:most].tolist() == own[layer, :most].tolist()
    table = by_head(dealt, counts)
    for layer, numbers in enumerate(dealt):
        rest = numbers.tolist()
        for head, count in enumerate(counts[layer].tolist()):
            assert table[layer, head, :count].tolist() == rest[:count]
            assert not table[layer, head, count:].any()
            rest = rest[count:]


def test_more_than_there_is_is_an_error() -> None:
    own = own_sub_blocks(torch.tensor([5, 2]), 1, torch.tensor([0, 100]))
    with pytest.raises(ValueError, match="4 sub-blocks cannot hold 5"):
        assign(own, torch.tensor([[5], [0]]))


def test_caches_of_one_allocation_are_one_tensor() -> None:
    memory = torch.arange(3 + 5 * 24.0)[3:].view(5, 2, 3, 4)
    joined, bases = in_one_piece([memory[2:4], memory[:2]])  # type: ignore[misc]
    assert bases.tolist() == [2, 0]
    assert torch.equal(joined, memory[:4])
    joined[3] = -1
    assert bool((memory[3] == -1).all())


def test_caches_that_lie_apart_are_not() -> None:
    memory = torch.zeros(200)
    first = memory[:48].view(2, 2, 3, 4)
    assert in_one_piece([first, torch.zeros(2, 2, 3, 4)]) is None
    assert in_one_piece([first, memory[50:98].view(2, 2, 3, 4)]) is None  # half a block too far
    assert in_one_piece([first, memory[48:96].view(2, 3, 2, 4).transpose(1, 2)]) is None
