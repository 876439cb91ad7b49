"""Torch reference of compaction: the chosen entries of every head move into dealt sub-blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from uncomp.kernels.paged import (
    Caches,
    Holdings,
    Rows,
    head_lengths,
    stored_sub_blocks,
    sub_blocks,
)


def compact(
    caches: Caches,
    positions: Tensor,
    rows: Rows,
    holdings: Holdings,
    chosen: Tensor,
    counts: Tensor,
    offsets: Tensor,
    kept_blocks: Tensor,
    kept_count: Tensor,
    scratch: Tensor | None = None,
) -> None:
    """Move K, V and positions of the chosen entries; sources and destinations may overlap.

    Sub-block i of the dealt list lies in block `kept_blocks[r, i // H]`, head slot `i % H`; the
    list is used up to the sum of the counts, which must not exceed `kept_count[r] * H`. All else
    stays as it is. `holdings` is only read; see `record`.

    Args:
        caches: changed in place, as bytes (FP8 is not dequantised). L layers, H heads.
        positions: `[L, num_blocks, H, block_size]` int32, token positions of kept entries at the
            place of the entry; changed in place.
        rows, holdings: R requests as they are *before* this compaction.
        chosen: `[L, R, K]` int32, entry numbers in dealt order: those of head h are at
            `offsets[l, r, h] * block_size`, `counts[l, r, h] * block_size` of them. The rest is
            not looked at.
        counts, offsets: `[L, R, H]` int32, sub-blocks that every head keeps, and their exclusive
            sum over the heads.
        kept_blocks: `[R, n]` int32, block ids to fill; from `kept_count[r]` on not looked at.
        kept_count: `[R]` int32.
        scratch: not used here; the Triton version's buffer.

    Raises:
        ValueError: counts that need more blocks, or entries that a head does not hold.
    """
    lengths = head_lengths(rows, holdings, caches.block_size)
    for layer in range(caches.layers):
        # Everything is read before anything is written, across requests too.
        read = [
            _read(caches, positions, rows, holdings, chosen, counts, offsets, lengths, layer, row)
            for row in range(len(rows.lengths))
        ]
        for row, (entries, places) in enumerate(read):
            used = len(entries) // caches.block_size
            if used > int(kept_count[row]) * caches.heads:
                raise ValueError(
                    f"compact: request {row} keeps {used} sub-blocks in layer {layer}, but "
                    f"{int(kept_count[row])} blocks hold only {int(kept_count[row]) * caches.heads}"
                )
            dealt = torch.arange(used, device=caches.device)
            block = kept_blocks[row].long()[dealt // caches.heads]
            inside = dealt % caches.heads
            shape = (used, caches.block_size)
            _bytes(caches, layer)[block, inside] = entries.view(*shape, entries.shape[1])
            positions[layer, block, inside] = places.view(shape)


def record(
    holdings: Holdings,
    slots: Tensor,
    counts: Tensor,
    offsets: Tensor,
    first: Tensor,
    full: Tensor,
) -> None:
    """Write what `compact` did into the table; no host synchronisation.

    Args:
        holdings: changed in place.
        slots: `[R]` int32, all different, none -1: where the requests are from now on.
        counts, offsets: `[L, R, H]` int32, as given to `compact`.
        first, full: `[R]` int32, columns of the block row where the kept blocks and the tail begin.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    layers, _, heads = holdings.counts.shape
    requests = slots.shape[0]
    for name, tensor, shape in (
        ("slots", slots, (requests,)),
        ("counts", counts, (layers, requests, heads)),
        ("offsets", offsets, (layers, requests, heads)),
        ("first", first, (requests,)),
        ("full", full, (requests,)),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != torch.int32:
            raise ValueError(
                f"record: {name} must be int32 {list(shape)}, got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
    index = slots.long()
    holdings.counts.index_copy_(1, index, counts)
    holdings.offsets.index_copy_(1, index, offsets)
    holdings.spans[:, 0].index_copy_(0, index, first)
    holdings.spans[:, 1].index_copy_(0, index, full)


def _bytes(caches: Caches, layer: int) -> Tensor:
    """A layer's cache as bytes, `[num_blocks, H, block_size, 2 * d * itemsize]` uint8; a view."""
    return caches.tensors[layer].view(torch.uint8)


def _read(
    caches: Caches,
    positions: Tensor,
    rows: Rows,
    holdings: Holdings,
    chosen: Tensor,
    counts: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    layer: int,
    row: int,
) -> tuple[Tensor, Tensor]:
    """Chosen entries of a request in dealt order: `[E, bytes]` uint8, and `[E]` int32 positions."""
    size, cache = caches.block_size, _bytes(caches, layer)
    known = stored_sub_blocks(rows, holdings, row, layer).tolist()
    entries = [cache.new_empty(0, cache.shape[3])]
    places = [positions.new_empty(0)]
    for head in range(caches.heads):
        start = int(offsets[layer, row, head]) * size
        wanted = chosen[layer, row, start : start + int(counts[layer, row, head]) * size].long()
        held = int(lengths[layer, row, head])
        if bool(((wanted < 0) | (wanted >= held)).any()):
            raise ValueError(
                f"compact: layer {layer}, request {row}, head {head} holds entries 0..{held - 1}, "
                f"chosen are {int(wanted.min())}..{int(wanted.max())}"
            )
        at = sub_blocks(rows, holdings, row, layer, head, -(-held // size)).to(caches.device)
        block, inside = at[wanted // size].unbind(1)
        entries.append(cache[block, inside, wanted % size])
        stored = positions[layer, block, inside, wanted % size]
        follows = wanted + int(rows.lengths[row]) - held
        places.append(torch.where(wanted < known[head] * size, stored, follows))
    return torch.cat(entries), torch.cat([p.to(torch.int32) for p in places])
