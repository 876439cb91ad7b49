"""What a request holds when it is compacted, and what the order says about every entry of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from uncomp.config import UncompConfig
from uncomp.engine.orders import Order
from uncomp.engine.state import CompressedRequests
from uncomp.spans import places


@dataclass(frozen=True)
class Held:
    """What a request holds in some layers; see CompressedRequests.entries.

    Attributes:
        sub_blocks: [layers, heads, n] int64.
        lengths: [layers, heads] int64.
        positions: [layers, heads, n * block_size] int64.
    """

    sub_blocks: Tensor
    lengths: Tensor
    positions: Tensor

    def part(self, layers: slice) -> Held:
        return Held(self.sub_blocks[layers], self.lengths[layers], self.positions[layers])


@dataclass(frozen=True)
class Bounds:
    """What an order says about the entries of some layers, [layers, heads, N] each, bool but one.

    Attributes:
        valid: holds a token.
        eligible: valid, and the choice is made from it (not the tail).
        forced: eligible, and stays in any case.
        recent: of the last tokens, which stay, or padding.
        places: int32, for scores that are handed on, see `uncomp.spans.places`; garbage where there
            is no token.
    """

    valid: Tensor
    eligible: Tensor
    forced: Tensor
    recent: Tensor
    places: Tensor

    @classmethod
    def of(cls, order: Order, held: Held, config: UncompConfig, block_size: int) -> Bounds:
        positions, limit = held.positions, order.full_blocks * block_size
        valid = torch.arange(positions.shape[2]) < held.lengths.unsqueeze(2)
        eligible = valid & (positions < limit)
        recent = positions >= order.num_tokens - config.recent_tokens
        forced = eligible & ((positions < config.sinks) | recent)
        for start, end in order.protect:
            forced |= eligible & (positions >= start) & (positions < end)
        stand = torch.zeros(1, dtype=torch.int32).expand(positions.shape)
        if order.gaps:  # told where scores are handed on by words
            at = torch.from_numpy(places(order.gaps, order.num_tokens))
            stand = at[positions.clamp(0, order.num_tokens - 1)]
        return cls(valid, eligible, forced, recent, stand)

    def part(self, layers: slice) -> Bounds:
        return Bounds(
            self.valid[layers],
            self.eligible[layers],
            self.forced[layers],
            self.recent[layers],
            self.places[layers],
        )

    def minimum(self, block_size: int) -> Tensor:
        """[layers, heads] sub-blocks that the forced entries need."""
        return -(-self.forced.sum(2) // block_size)

    def maximum(self, block_size: int) -> Tensor:
        """[layers, heads] sub-blocks that the eligible entries fill."""
        return self.eligible.sum(2) // block_size


def held_by(requests: CompressedRequests, order: Order, row: Tensor) -> Held:
    """What the order's request holds; `row`: see `Compactor.run`."""
    layers, heads, block_size = requests.layers, requests.heads, requests.block_size
    slot = requests.slots.get(order.request_id)
    if slot is not None:
        entries = [requests.entries(slot, i, order.num_tokens) for i in range(layers)]
        width = max(sub_blocks.shape[1] for sub_blocks, _, _ in entries)
        return Held(
            torch.stack([pad(sub_blocks, width) for sub_blocks, _, _ in entries]),
            torch.stack([lengths for _, lengths, _ in entries]),
            torch.stack([pad(at, width * block_size) for _, _, at in entries]),
        )
    blocks = row[: math.ceil(order.num_tokens / block_size)].long()
    positions = torch.arange(blocks.numel() * block_size)
    return Held(
        requests.bases[:, None, None] + (blocks * heads + torch.arange(heads).unsqueeze(1)),
        torch.full((layers, heads), order.num_tokens),
        positions.expand(layers, heads, -1),
    )


def pad(tensor: Tensor, width: int) -> Tensor:
    """Zeros behind the last dimension, up to a width."""
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))
