"""Torch reference of compaction: the chosen entries of every head move into dealt sub-blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from uncomp.kernels.paged import (
    Caches,
    Holdings,
    Rows,
    head_lengths,
    read,
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
    begins: Tensor | None = None,
) -> None:
    """Move K, V and positions of the chosen entries; sources and destinations may overlap.

    Sub-block i of the dealt list lies in block `kept_blocks[r, i // H]`, head slot `i % H`; the
    list is used up to the sum of the counts, which must not exceed `kept_count[r] * H`. All else
    stays as it is. `holdings` is only read; see `record`.

    Where all layers share (`holdings.shared`), the list of a layer goes on where that of the layer
    before ends: every layer has `kept_count[r] * H` places, in order of the layers.

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
        begins: `[L, R]` int32, number of the first sub-block of each layer's list; None where
            layers do not share.

    Raises:
        ValueError: counts that need more blocks, entries that a head does not hold, or some of the
            layers only, where they share.
    """
    if holdings.shared and (caches.whole is not None or begins is None):
        raise ValueError("compact: layers that share are moved together, and need `begins`")
    lengths = head_lengths(rows, holdings, caches.block_size)
    # Everything is read before anything is written, across requests and layers too.
    found = [
        [
            _read(caches, positions, rows, holdings, chosen, counts, offsets, lengths, layer, row)
            for row in range(len(rows.lengths))
        ]
        for layer in range(caches.layers)
    ]
    for layer, of_layer in enumerate(found):
        for row, (entries, places) in enumerate(of_layer):
            used, each = len(entries) // caches.block_size, int(kept_count[row]) * caches.heads
            begin = 0 if begins is None else int(begins[layer, row])
            room = each * (caches.layers if holdings.shared else 1) - begin
            if used > room:
                raise ValueError(
                    f"compact: request {row} keeps {used} sub-blocks in layer {layer}, but "
                    f"{int(kept_count[row])} blocks hold only {room}"
                )
            dealt = begin + torch.arange(used, device=caches.device)
            shape = (used, caches.block_size)
            entries, places = entries.view(*shape, entries.shape[1]), places.view(shape)
            for i, number in enumerate(dealt.tolist()):
                where = number // each if holdings.shared else layer
                block = int(kept_blocks[row, number % each // caches.heads])
                inside = number % caches.heads
                _bytes(caches, where)[block, inside] = entries[i]
                positions[where, block, inside] = places[i]


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
    everywhere = [_bytes(caches.all, i) for i in range(caches.all.layers)]
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
        index, token = wanted // size, wanted % size
        entries.append(read(everywhere, at)[index, token])
        here = at - torch.tensor([holdings.start, 0, 0], device=at.device)
        stored = read(list(positions), here)[index, token]
        follows = wanted + int(rows.lengths[row]) - held
        places.append(torch.where(wanted < known[head] * size, stored, follows))
    return torch.cat(entries), torch.cat([p.to(torch.int32) for p in places])
