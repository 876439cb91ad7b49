"""Where all layers share one budget: what each of them keeps, decided on the host.

How many entries a head has and how many of them must stay follows from the orders, so that nothing
waits for the device to count them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uncomp.config import UncompConfig
from uncomp.engine.device_state import DeviceSlot, to_device
from uncomp.engine.orders import Order
from uncomp.importance import Needs, deal, in_order


@dataclass(frozen=True)
class Dealt:
    """What the orders of one launch leave in the layers; R requests.

    Attributes:
        begins: [layers, R] int32 on the device, number of the first sub-block of every layer.
        counts: [layers, R, heads] int32 on the device, or None: the policy deals every layer's
            part.
        host: a request each, [layers, heads] int64; empty if the policy deals.
    """

    begins: Tensor
    counts: Tensor | None
    host: tuple[Tensor, ...]


def deal_order(
    needs: Needs,
    order: Order,
    slot: DeviceSlot | None,
    config: UncompConfig,
    shape: tuple[int, int],
    block_size: int,
) -> Tensor:
    """Sub-blocks that an order leaves to every head, `[layers, heads]` int64 in host memory.

    A first compaction goes from layer to layer inside the request's own blocks, so that the layers
    up to each must have room for what they keep; later ones write to other blocks.

    Args:
        slot: what the request holds; None: its whole prompt.
        shape: (layers, heads).
    """
    forced = order.forced_tokens(config.sinks, config.recent_tokens, block_size)
    if slot is None or slot.counts is None:
        maximum = torch.full(shape, order.full_blocks)
    else:
        maximum = slot.counts + (order.full_blocks - slot.full_blocks)
    minimum = torch.full(shape, -(-forced // block_size)).minimum(maximum)
    each = len(order.kept_blocks) * shape[1]
    counts = deal(needs, each * shape[0], minimum, maximum, config.least_share)
    return counts if slot is not None else in_order(counts, each, minimum, maximum)


def dealt(
    host: Sequence[Tensor], orders: Sequence[Order], shape: tuple[int, int], device: torch.device
) -> Dealt:
    """The same for the device.

    Args:
        host: see `Dealt`.
    """
    if host:
        counts = torch.stack(list(host), 1)
        totals = counts.sum(2)
        begins = totals.cumsum(0) - totals
        on_device = to_device(counts.tolist(), torch.int32, device)
        return Dealt(to_device(begins.tolist(), torch.int32, device), on_device, tuple(host))
    layers, heads = shape
    rows = [[i * len(order.kept_blocks) * heads for order in orders] for i in range(layers)]
    return Dealt(to_device(rows, torch.int32, device), None, ())
