"""Where the entries of a head lie in vLLM's paged cache, before and after compaction: reference.

A block holds `block_size` tokens of all H KV heads: H *sub-blocks*. A request that was compacted
owns whole blocks whose sub-blocks are dealt to its heads, head after head; blocks after the last
compaction (the tail) are in vLLM's own order. So the place of every entry follows from the block
row, two numbers of the request (`first`, `full`) and two of the head (`count`, `offset`).

A prompt that was only pruned (fewer tokens in later layers) is all tail, in vLLM's order, and
begins later in some layers than in others: the count of a layer that lacks n blocks is -n, `full`
is 0, and `first` says up to which column the positions of entries have to be looked up.

Where all layers share one budget, sub-blocks are dealt through all layers: first those of layer 0,
then those of layer 1, and so on. A layer that keeps more than its blocks hold has entries in the
caches of other layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Caches:
    """The KV caches of all attention layers of one rank.

    Attributes:
        tensors: per layer `[num_blocks, H, block_size, 2 * d]`, K then V in the last dimension; any
            strides, the same for all layers, with the last one 1.
        pointers: `[L]` int64 on the device of the caches, addresses of the first elements.
        scales: `[L, 2]` float32, K and V scale: cached value times scale is the true value. 1 for
            caches that are not FP8.
        whole: what this is a part of; None: all layers.
    """

    tensors: tuple[Tensor, ...]
    pointers: Tensor
    scales: Tensor
    whole: Caches | None = None

    @classmethod
    def of(cls, tensors: list[Tensor] | tuple[Tensor, ...], scales: Tensor | None = None) -> Caches:
        """Describe cache tensors.

        Raises:
            ValueError: no tensors, or layers that differ in shape, strides, dtype or device.
        """
        if not tensors:
            raise ValueError("Caches.of needs the cache of at least one layer")
        first = tensors[0]
        if first.dim() != 4 or first.shape[3] % 2 or first.stride(3) != 1:
            raise ValueError(
                "a cache must be [num_blocks, H, block_size, 2 * d] with last stride 1, got "
                f"{list(first.shape)} with strides {first.stride()}"
            )
        for i, tensor in enumerate(tensors):
            same = (
                tensor.shape == first.shape
                and tensor.stride() == first.stride()
                and tensor.dtype == first.dtype
                and tensor.device == first.device
            )
            if not same:
                raise ValueError(
                    f"the caches of all layers must be alike; layer {i} is {list(tensor.shape)} "
                    f"{tensor.stride()} {tensor.dtype} on {tensor.device}, layer 0 is "
                    f"{list(first.shape)} {first.stride()} {first.dtype} on {first.device}"
                )
        pointers = torch.tensor([t.data_ptr() for t in tensors], device=first.device)
        if scales is None:
            scales = torch.ones(len(tensors), 2, device=first.device)
        return cls(tuple(tensors), pointers, scales.to(torch.float32))

    def part(self, start: int, stop: int) -> Caches:
        """Layers `[start, stop)` only."""
        part = self.tensors[start:stop], self.pointers[start:stop], self.scales[start:stop]
        return Caches(*part, self.all)

    @property
    def all(self) -> Caches:
        """The caches of all layers."""
        return self if self.whole is None else self.whole

    @property
    def layers(self) -> int:
        return len(self.tensors)

    @property
    def heads(self) -> int:
        return self.tensors[0].shape[1]

    @property
    def block_size(self) -> int:
        return self.tensors[0].shape[2]

    @property
    def head_size(self) -> int:
        return self.tensors[0].shape[3] // 2

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def strides(self) -> tuple[int, int, int]:
        """Elements from block to block, head to head, token to token."""
        block, head, token, _ = self.tensors[0].stride()
        return block, head, token


@dataclass(frozen=True)
class Holdings:
    """What compressed requests hold. S: slots, one a compressed request.

    Attributes:
        counts: `[L, S, H]` int32, kept sub-blocks of each head; minus the blocks that a layer of a
            pruned prompt lacks.
        offsets: `[L, S, H]` int32, where they begin in the dealt list: exclusive sum of `counts`
            over the heads, and over the layers before if they share.
        spans: `[S, 2]` int32: columns of the block row where the kept blocks begin (`first`) and
            where the tail begins (`full`).
        shared: whether sub-blocks are dealt through all layers.
        start: number of the first layer among all.
    """

    counts: Tensor
    offsets: Tensor
    spans: Tensor
    shared: bool = False
    start: int = 0

    @classmethod
    def empty(
        cls, layers: int, slots: int, heads: int, device: torch.device | str, shared: bool = False
    ) -> Holdings:
        """Zeros for `slots` slots."""
        table = torch.zeros(layers, slots, heads, dtype=torch.int32, device=device)
        spans = torch.zeros(slots, 2, dtype=torch.int32, device=device)
        return cls(table, table.clone(), spans, shared)

    def part(self, start: int, stop: int) -> Holdings:
        """Layers `[start, stop)` only; views."""
        part = self.counts[start:stop], self.offsets[start:stop]
        return Holdings(*part, self.spans, self.shared, self.start + start)

    @property
    def slots(self) -> int:
        return self.counts.shape[1]


@dataclass(frozen=True)
class Rows:
    """Requests of one launch.

    Attributes:
        blocks: `[R, W]` int32, vLLM's block ids in order of position; any row stride, last stride
            1. Columns before `first` and beyond the sequence are stale.
        lengths: `[R]` int32, tokens of the sequence, kept or not.
        slots: `[R]` int32, slot in the `Holdings`; -1 for a request that was never compacted.
    """

    blocks: Tensor
    lengths: Tensor
    slots: Tensor


def head_lengths(rows: Rows, holdings: Holdings, block_size: int) -> Tensor:
    """Entries that every head holds, `[L, R, H]` int64."""
    held = (rows.slots >= 0)[:, None]
    slots = rows.slots.clamp_min(0).long()
    kept = holdings.counts[:, slots].long() * held
    full = holdings.spans[slots, 1].long()[:, None] * held
    return kept * block_size + rows.lengths.long()[:, None] - full * block_size


def sub_blocks(rows: Rows, holdings: Holdings, row: int, layer: int, head: int, n: int) -> Tensor:
    """Where the first `n` sub-blocks of one head lie: layer (of all), block and head slot, `[n, 3]`
    int64."""
    heads = holdings.counts.shape[2]
    slot = int(rows.slots[row])
    count = offset = first = full = 0
    if slot >= 0:
        count = int(holdings.counts[layer, slot, head])
        offset = int(holdings.offsets[layer, slot, head])
        first, full = holdings.spans[slot].tolist()
    index = torch.arange(n, device=rows.blocks.device)
    dealt = offset + index
    kept = index < count
    own = torch.full_like(index, holdings.start + layer)
    where = own
    if holdings.shared:
        each = max(full - first, 1) * heads  # sub-blocks that a layer has to deal
        where = torch.where(kept, dealt // each, own)
        dealt = dealt % each
    column = torch.where(kept, first + dealt // heads, full + index - count)
    inside = torch.where(kept, dealt % heads, head)
    return torch.stack([where, rows.blocks[row, column].long(), inside], 1)


def stored_sub_blocks(rows: Rows, holdings: Holdings, row: int, layer: int) -> Tensor:
    """`[H]` int64: of how many sub-blocks of each head, its first ones, positions are stored.

    Later entries lie where their position says, counted from the end of the sequence.
    """
    slot = int(rows.slots[row])
    if slot < 0:
        return torch.zeros(holdings.counts.shape[2], dtype=torch.int64, device=rows.slots.device)
    counts = holdings.counts[layer, slot].long()
    first, full = holdings.spans[slot].tolist()
    return torch.maximum(counts.clamp_min(0), first - full + counts)


def read(tensors: Sequence[Tensor], at: Tensor) -> Tensor:
    """Contents of sub-blocks, `[n, block_size, ...]`.

    Args:
        tensors: of all layers, `[num_blocks, H, block_size, ...]`.
        at: `[n, 3]`, see `sub_blocks`.
    """
    layers = at[:, 0]
    found = torch.empty((len(at), *tensors[0].shape[2:]), dtype=tensors[0].dtype, device=at.device)
    for layer in layers.unique().tolist():
        here = layers == layer
        values = tensors[layer][at[here, 1], at[here, 2]]
        bits(found)[here] = bits(values)
    return found


def bits(tensor: Tensor) -> Tensor:
    """FP8 as bytes, which can be indexed; a view."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def gather(
    caches: Caches, rows: Rows, holdings: Holdings, row: int, layer: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Everything one layer of one request holds, dequantised.

    Returns:
        keys, values: `[H, N, d]` float32 (float64 for float64 caches), zero beyond the lengths.
        lengths: `[H]` int64.
    """
    lengths = head_lengths(rows, holdings, caches.block_size)[layer, row]
    size, block_size = caches.head_size, caches.block_size
    dtype = torch.float64 if caches.dtype == torch.float64 else torch.float32
    shape = (caches.heads, max(int(lengths.max()), 0), size)
    keys = torch.zeros(shape, dtype=dtype, device=caches.device)
    values = torch.zeros_like(keys)
    for head, length in enumerate(lengths.tolist()):
        n = -(-length // block_size)
        at = sub_blocks(rows, holdings, row, layer, head, n)
        tokens = read(caches.all.tensors, at).to(dtype).reshape(-1, 2 * size)[:length]
        keys[head, :length] = tokens[:, :size] * caches.scales[layer, 0]
        values[head, :length] = tokens[:, size:] * caches.scales[layer, 1]
    return keys, values, lengths
