"""Worker side: where every head of every compressed request lives.

A compressed request owns a slot in tables that hold, for every layer and KV head, the numbers of
its sub-blocks in order: first the kept ones, then its share of each later block. The tables change
when a request is compacted and when it starts a new block, not with every step or layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Slot:
    """One compressed request.

    Attributes:
        index: row in the tables.
        generation: compactions so far; must equal the scheduler's count. 0: only pruned.
        full_blocks: full blocks at the last compaction; later ones are the tail.
        num_blocks: blocks of the request's row that the table covers.
        positions: [layers, heads, max kept] int32, token positions of the kept entries, ascending.
        entropy: [layers, heads] used for dealing, kept for later compactions; or ``None``.
    """

    index: int
    generation: int
    full_blocks: int
    num_blocks: int
    positions: Tensor
    entropy: Tensor | None


@dataclass(frozen=True)
class Batch:
    """Attention inputs of the compressed rows of one step, one sequence per (row, KV head).

    Attributes:
        lengths: [layers, rows * heads] int32, cached tokens including this step's.
        tables: [layers, rows * heads, width] int32, sub-block numbers.
    """

    lengths: Tensor
    tables: Tensor


class CompressedRequests:
    """All compressed requests of one worker.

    Args:
        layers, heads: attention layers and KV heads of this rank.
        block_size: tokens per block.
        bases: [layers] int64, number of every layer's first sub-block: layers that lie in one
            piece of memory are numbered through. Default: each begins at 0.
    """

    def __init__(
        self, layers: int, heads: int, block_size: int, bases: Tensor | None = None
    ) -> None:
        self.layers, self.heads, self.block_size = layers, heads, block_size
        self.bases = torch.zeros(layers, dtype=torch.int64) if bases is None else bases
        self.slots: dict[str, Slot] = {}
        self._free: list[int] = []
        self._table = torch.zeros(layers, 0, heads, 0, dtype=torch.int32)
        #: kept sub-blocks per head: [layers, slots, heads]
        self._kept = torch.zeros(layers, 0, heads, dtype=torch.int64)
        self._cached_for: tuple[int, ...] | None = None
        self._cached: tuple[Tensor, Tensor] | None = None

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.slots

    def __len__(self) -> int:
        return len(self.slots)

    def drop(self, request_id: str) -> None:
        """Forget a request (finished, preempted, resumed, or its id reused)."""
        slot = self.slots.pop(request_id, None)
        if slot is not None:
            self._free.append(slot.index)
            self._cached_for = None

    def place(
        self,
        request_id: str,
        generation: int,
        full_blocks: int,
        kept: Tensor,
        sub_blocks: Tensor,
        positions: Tensor,
        entropy: Tensor | None,
    ) -> None:
        """Record a finished compaction (or pruning: generation 0).

        Args:
            full_blocks: full blocks of the request then.
            kept: [layers, heads] int64, sub-blocks per head.
            sub_blocks: [layers, heads, max kept] int64, their numbers, valid up to ``kept``.
            positions: [layers, heads, max kept * block_size] int32.
        """
        slot = self.slots.get(request_id)
        index = slot.index if slot is not None else self._take_index()
        self._widen(sub_blocks.shape[2])
        self._kept[:, index] = kept
        self._table[:, index, :, : sub_blocks.shape[2]] = sub_blocks
        self.slots[request_id] = Slot(
            index, generation, full_blocks, full_blocks, positions, entropy
        )
        self._cached_for = None

    def place_pruned(
        self, request_id: str, num_tokens: int, row: Tensor, kept: list[Tensor]
    ) -> None:
        """Record what a pruned prompt left in every layer, at the end of its blocks.

        Args:
            row: [blocks] int, the request's block ids.
            kept: per layer [n] int64, the positions it holds, ascending; a whole number of blocks
                fewer than ``num_tokens``, and the last ones among them.
        """
        full = num_tokens // self.block_size
        tail = num_tokens - full * self.block_size
        blocks = torch.tensor([(len(at) - tail) // self.block_size for at in kept])
        width = int(blocks.max())
        column = torch.arange(width)
        used = column < blocks.unsqueeze(1)
        index = torch.where(used, full - blocks.unsqueeze(1) + column, 0)
        first = (row.long()[index] * self.heads + self.bases[:, None]).unsqueeze(1)
        numbers = torch.where(used.unsqueeze(1), first + torch.arange(self.heads)[:, None], 0)
        positions = torch.zeros(self.layers, 1, width * self.block_size, dtype=torch.int32)
        for layer, at in enumerate(kept):
            positions[layer, 0, : len(at) - tail] = at[: len(at) - tail]
        self.place(
            request_id,
            0,
            full,
            blocks.unsqueeze(1).expand(-1, self.heads),
            numbers,
            positions.expand(-1, self.heads, -1),
            None,
        )

    def extend(self, slot: Slot, row: Tensor, num_blocks: int) -> None:
        """Add the blocks ``[slot.num_blocks, num_blocks)`` of the request's block row."""
        heads = torch.arange(self.heads)
        for i in range(slot.num_blocks, num_blocks):
            columns = self._kept[:, slot.index] + (i - slot.full_blocks)
            self._widen(int(columns.max()) + 1)
            numbers = self.bases[:, None] + (int(row[i]) * self.heads + heads)
            self._table[:, slot.index].scatter_(
                2, columns.unsqueeze(-1), numbers.to(torch.int32).unsqueeze(-1)
            )
        if num_blocks > slot.num_blocks:
            slot.num_blocks = num_blocks
            self._cached_for = None

    def batch(self, slots: list[Slot], seq_lens: Tensor) -> Batch:
        """Gather the tables of a step; reused while neither rows nor blocks change.

        Args:
            seq_lens: [rows] int, tokens of each row including this step's.
        """
        indices = tuple(slot.index for slot in slots)
        if indices != self._cached_for or self._cached is None:
            at = torch.tensor(indices)
            kept = (self._kept[:, at] * self.block_size).flatten(1).to(torch.int32)
            self._cached = kept, self._table[:, at].flatten(1, 2).contiguous()
            self._cached_for = indices
        kept, tables = self._cached
        full = torch.tensor([slot.full_blocks for slot in slots]) * self.block_size
        tail = (seq_lens - full).to(torch.int32).repeat_interleave(self.heads)
        return Batch(kept + tail, tables)

    def entries(self, slot: Slot, layer: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """What one layer of a compressed request holds.

        Returns:
            sub_blocks: [heads, n] int64, padded with 0 (vLLM's null block).
            lengths: [heads] int64, valid tokens.
            positions: [heads, n * block_size] int64, of each token slot.
        """
        kept = self._kept[layer, slot.index]
        tail_start = slot.full_blocks * self.block_size
        lengths = kept * self.block_size + (num_tokens - tail_start)
        width = int((lengths.max() + self.block_size - 1) // self.block_size)
        column = torch.arange(width)
        used = column < ((lengths + self.block_size - 1) // self.block_size).unsqueeze(1)
        table = self._table[layer, slot.index, :, :width].long()
        sub_blocks = torch.where(used, table, 0)
        token = torch.arange(width * self.block_size)
        tokens_kept = (kept * self.block_size).unsqueeze(1)
        positions = tail_start + token - tokens_kept
        stored = slot.positions[layer].long()
        reach = min(stored.shape[1], token.numel())
        inside = token[:reach] < tokens_kept
        positions[:, :reach] = torch.where(inside, stored[:, :reach], positions[:, :reach])
        return sub_blocks, lengths, positions

    def kept_positions(self, slot: Slot) -> list[list[list[int]]]:
        """Positions kept by the last compaction: [layer][head][...]."""
        counts = (self._kept[:, slot.index] * self.block_size).tolist()
        return [
            [slot.positions[layer, head, :n].tolist() for head, n in enumerate(row)]
            for layer, row in enumerate(counts)
        ]

    def _take_index(self) -> int:
        if not self._free:
            old = self._kept.shape[1]
            new = max(4, 2 * old)
            grown_kept = torch.zeros(self.layers, new, self.heads, dtype=torch.int64)
            grown_kept[:, :old] = self._kept
            grown = torch.zeros(
                self.layers, new, self.heads, self._table.shape[3], dtype=torch.int32
            )
            grown[:, :old] = self._table
            self._kept, self._table = grown_kept, grown
            self._free = list(range(new - 1, old - 1, -1))
        return self._free.pop()

    def _widen(self, width: int) -> None:
        have = self._table.shape[3]
        if width > have:
            grow = max(width, 2 * have, 8) - have
            self._table = torch.nn.functional.pad(self._table, (0, grow))
            self._cached_for = None
