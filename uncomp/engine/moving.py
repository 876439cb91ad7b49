"""Where survivors go: which sub-blocks the heads of a layer are dealt, and copying into them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uncomp.engine.cpu_layout import CacheLayout


def own_sub_blocks(blocks: Tensor, heads: int, bases: Tensor) -> Tensor:
    """Numbers of the sub-blocks that every layer has in these blocks, `[L, blocks * heads]`.

    Args:
        blocks: `[blocks]` int64, vLLM's block ids.
        bases: `[L]` int64, number of the first sub-block of every layer.
    """
    numbers = (blocks[:, None] * heads + torch.arange(heads)).flatten()
    return bases[:, None] + numbers


def assign(own: Tensor, counts: Tensor) -> list[Tensor]:
    """The sub-blocks of every layer, `counts.sum(1)` of them, in the order of its heads.

    A layer that keeps fewer than it has leaves the rest to layers that keep more.

    Args:
        own: `[L, n]` int64, see `own_sub_blocks`.
        counts: `[L, H]` int64.

    Raises:
        ValueError: the heads keep more than all layers have.
    """
    totals, most = counts.sum(1).tolist(), own.shape[1]
    if sum(totals) > own.numel():
        raise ValueError(f"{own.numel()} sub-blocks cannot hold {sum(totals)}")
    spare = torch.cat([row[total:] for row, total in zip(own, totals, strict=True)])
    found, taken = [], 0
    for row, total in zip(own, totals, strict=True):
        more = max(0, total - most)
        found.append(torch.cat([row[:total], spare[taken : taken + more]]))
        taken += more
    return found


def by_head(dealt: list[Tensor], counts: Tensor) -> Tensor:
    """Sub-blocks of every layer in the order of its heads -> `[L, H, max count]`, 0 beyond."""
    rows = torch.nn.utils.rnn.pad_sequence(dealt, batch_first=True)
    first = counts.cumsum(1) - counts
    column = torch.arange(int(counts.max()))
    used = column < counts.unsqueeze(2)
    index = torch.where(used, first.unsqueeze(2) + column, 0)
    if not rows.numel():
        return torch.zeros_like(index)
    found = rows.gather(1, index.flatten(1)).view(index.shape)
    return torch.where(used, found, 0)


@dataclass(frozen=True)
class Survivors:
    """What one layer keeps, read and not yet written.

    Attributes:
        cache: see `CacheLayout`.
        sub_blocks: `[n]` int64, where it goes.
        keys, values: `[n, block_size, d]`.
    """

    cache: Tensor
    sub_blocks: Tensor
    keys: Tensor
    values: Tensor

    def write(self, layout: CacheLayout) -> None:
        layout.write(self.cache, self.sub_blocks, self.keys, self.values)
