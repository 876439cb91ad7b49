"""Random paged caches with compacted and plain requests, every unused place poisoned with NaN."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from uncomp.kernels.paged import Caches, Holdings, Rows, sub_blocks


@dataclass(frozen=True)
class Pruned:
    """A prompt of `full` full blocks, of which layer i has `full - dropped[i]`."""

    full: int
    dropped: tuple[int, ...]


@dataclass
class Case:
    caches: Caches
    rows: Rows
    holdings: Holdings


def make_case(
    lengths: list[int],
    compacted: list[tuple[int, int] | Pruned | None],
    *,
    layers: int = 2,
    heads: int = 3,
    head_size: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    layout: str = "HND",
    spare_slots: int = 2,
    seed: int = 0,
    spread: float = 1.0,
    shared: bool = False,
) -> Case:
    """Requests of these lengths; `compacted[r]` is (kept blocks, full blocks then), `Pruned`, None.

    Heads of a compacted request get random unequal counts that use up all kept sub-blocks, those of
    each layer or, `shared`, those of all layers. Cache
    values are `spread` times normal; whatever no request holds is NaN (fp8: 240, which has no NaN
    that survives arithmetic unseen).
    """
    random = torch.Generator().manual_seed(seed)
    slots = sum(c is not None for c in compacted) + spare_slots
    width = max(-(-n // block_size) for n in lengths) + 3
    num_blocks = 1 + len(lengths) * width
    order = torch.randperm(num_blocks - 1, generator=random) + 1
    blocks = order[: len(lengths) * width].view(len(lengths), width).to(torch.int32)
    holdings = Holdings.empty(layers, slots, heads, "cpu", shared)
    row_slots = torch.full((len(lengths),), -1, dtype=torch.int32)
    free = torch.randperm(slots, generator=random).tolist()
    for row, compaction in enumerate(compacted):
        if compaction is None:
            continue
        row_slots[row] = slot = free.pop()
        if isinstance(compaction, Pruned):
            holdings.spans[slot] = torch.tensor([compaction.full, 0])
            dropped = torch.tensor(compaction.dropped[:layers], dtype=torch.int32)
            holdings.counts[:, slot] = -dropped[:, None]
            continue
        kept, full = compaction
        assert kept <= full
        assert full * block_size <= lengths[row]
        holdings.spans[slot] = torch.tensor([full - kept, full])
        if shared:
            split = _split(kept * heads * layers, heads * layers, full, random)
            holdings.counts[:, slot] = split.view(layers, heads)
            continue
        for layer in range(layers):
            holdings.counts[layer, slot] = _split(kept * heads, heads, full, random)
    holdings.offsets.copy_(holdings.counts.cumsum(2) - holdings.counts)
    if shared:  # numbered through all layers
        before = holdings.counts.sum(2).cumsum(0) - holdings.counts.sum(2)
        holdings.offsets.add_(before.unsqueeze(2))
    rows = Rows(blocks, torch.tensor(lengths, dtype=torch.int32), row_slots)
    shape = (num_blocks, heads, block_size, 2 * head_size)
    storage = torch.float32 if dtype.itemsize == 1 else dtype
    tensors = []
    for _ in range(layers):
        empty = 240.0 if dtype.itemsize == 1 else float("nan")
        tensors.append(torch.full(shape, empty, dtype=storage))
    for layer in range(layers):
        for row, length in enumerate(lengths):
            for head in range(heads):
                _fill(tensors, rows, holdings, row, layer, head, length, spread, random)
    tensors = [cache.to(dtype) for cache in tensors]
    if layout == "NHD":
        tensors = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in tensors]
    scales = torch.rand(layers, 2, generator=random) + 0.5 if dtype.itemsize == 1 else None
    return Case(Caches.of(tensors, scales), rows, holdings)


def _fill(caches, rows, holdings, row, layer, head, length, spread, random) -> None:
    heads, block_size = caches[0].shape[1], caches[0].shape[2]
    slot = int(rows.slots[row])
    count = int(holdings.counts[layer, slot, head]) if slot >= 0 else 0
    full = int(holdings.spans[slot, 1]) if slot >= 0 else 0
    held = count * block_size + length - full * block_size
    assert heads == holdings.counts.shape[2]
    places = sub_blocks(rows, holdings, row, layer, head, -(-held // block_size))
    for index, (where, block, inside) in enumerate(places.tolist()):
        cache = caches[where]
        valid = min(block_size, held - index * block_size)
        values = spread * torch.randn(valid, cache.shape[3], generator=random)
        cache[block, inside, :valid] = values.to(cache.dtype)


def _split(total: int, heads: int, most: int, random: torch.Generator) -> torch.Tensor:
    """Random integers in 0..most with this sum."""
    counts = torch.zeros(heads, dtype=torch.int32)
    while total:
        head = int(torch.randint(heads, (1,), generator=random))
        take = min(
            total, most - int(counts[head]), 1 + int(torch.randint(3, (1,), generator=random))
        )
        counts[head] += take
        total -= take
    return counts
