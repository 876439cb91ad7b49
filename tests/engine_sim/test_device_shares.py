"""What the host deals for a device is what the entries of the cache say."""

from __future__ import annotations

import random

import pytest
import torch

from uncomp.config import UncompConfig
from uncomp.engine.device_shares import deal_order, dealt
from uncomp.engine.device_state import DeviceSlot
from uncomp.engine.held import Bounds, Held
from uncomp.engine.orders import Order
from uncomp.importance import Importance

SIZE, LAYERS, HEADS = 4, 3, 2


def order_at(tokens: int, kept: int, generation: int = 1, protect=()) -> Order:
    full = tokens // SIZE
    return Order("r", tokens, full, tuple(range(kept)), generation, protect)


@pytest.mark.parametrize("seed", range(40))
def test_forced_tokens_are_those_of_the_cache(seed: int) -> None:
    rng = random.Random(seed)
    tokens = rng.randint(1, 60)
    spans = [sorted(rng.choices(range(70), k=2)) for _ in range(rng.randint(0, 4))]
    protect = tuple((a, b) for a, b in spans)
    order = order_at(tokens, 0, protect=protect)
    config = UncompConfig(keep=0.5, sinks=rng.randint(0, 9), recent=rng.randint(0, 70))
    width = -(-tokens // SIZE)
    held = Held(
        torch.zeros(1, 1, width, dtype=torch.int64),
        torch.tensor([[tokens]]),
        torch.arange(width * SIZE).view(1, 1, -1),
    )
    bounds = Bounds.of(order, held, config, SIZE)
    found = order.forced_tokens(config.sinks, config.recent_tokens, SIZE)
    assert found == int(bounds.forced.sum())


def needs(seed: int = 0) -> Importance:
    shares = torch.rand(1, LAYERS, HEADS, generator=torch.Generator().manual_seed(seed))
    return Importance((0.5,), shares.double() ** 3)


@pytest.mark.parametrize("seed", range(5))
def test_a_first_compaction_leaves_room_and_a_later_one_need_not(seed: int) -> None:
    config = UncompConfig(keep=0.5, shares="calibrated", calibration="f", sinks=2, recent=4)
    shape = (LAYERS, HEADS)
    counts = deal_order(needs(seed), order_at(42, 4), None, config, shape, SIZE)
    assert int(counts.sum()) == 4 * HEADS * LAYERS
    assert bool((counts >= 2).all()), "two sinks and four recent tokens are two sub-blocks"
    assert bool((counts <= 10).all())
    room = torch.arange(1, LAYERS + 1) * 4 * HEADS
    assert bool((counts.sum(1).cumsum(0) <= room).all())

    slot = DeviceSlot(0, 1, 10, (8, 8, 8), 10, None, counts)
    later = deal_order(needs(seed), order_at(53, 5, 2), slot, config, shape, SIZE)
    assert int(later.sum()) == 5 * HEADS * LAYERS
    assert bool((later <= counts + 3).all()), "a head has what it kept and three blocks more"


def test_lists_follow_each_other_through_the_layers() -> None:
    host = [torch.tensor([[1, 2], [3, 0], [4, 2]]), torch.tensor([[2, 2], [2, 2], [2, 2]])]
    orders = [order_at(42, 2), order_at(50, 2)]
    found = dealt(host, orders, (LAYERS, HEADS), torch.device("cpu"))
    assert found.begins.tolist() == [[0, 0], [3, 4], [6, 8]]
    assert found.counts is not None
    assert found.counts[:, 0].tolist() == host[0].tolist()
    alone = dealt([], [order_at(42, 2), order_at(50, 3)], (LAYERS, HEADS), torch.device("cpu"))
    assert alone.begins.tolist() == [[0, 0], [4, 6], [8, 12]]
    assert alone.counts is None
