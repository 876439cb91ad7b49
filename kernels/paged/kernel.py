"""Device side of `naive.py`: the one place where kernels compute addresses."""

import triton
import triton.language as tl


@triton.jit
def head_state(
    counts_ptr, offsets_ptr, spans_ptr, layer, slot, head, num_slots, HEADS: tl.constexpr
):
    """(count, offset, first, full) of a head; all 0 for slot -1."""
    held = slot >= 0
    at = (layer * num_slots + slot) * HEADS + head
    count = tl.load(counts_ptr + at, mask=held, other=0)
    offset = tl.load(offsets_ptr + at, mask=held, other=0)
    first = tl.load(spans_ptr + slot * 2, mask=held, other=0)
    full = tl.load(spans_ptr + slot * 2 + 1, mask=held, other=0)
    return count, offset, first, full


@triton.jit
def head_length(length, count, full, BLOCK_SIZE: tl.constexpr):
    """Entries of a head of a sequence of `length` tokens."""
    return length + (count - full) * BLOCK_SIZE


@triton.jit
def head_of_program(
    lengths_ptr, slots_ptr, counts_ptr, offsets_ptr, spans_ptr, num_rows, num_slots,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Layer, row, head of `program_id(0)` (heads fastest), `head_state`, length and entries."""
    program = tl.program_id(0)
    head = program % HEADS
    row = program // HEADS % num_rows
    layer = program // HEADS // num_rows
    slot = tl.load(slots_ptr + row)
    count, offset, first, full = head_state(
        counts_ptr, offsets_ptr, spans_ptr, layer, slot, head, num_slots, HEADS
    )
    length = tl.load(lengths_ptr + row)
    n = head_length(length, count, full, BLOCK_SIZE)
    return layer, row, head, count, offset, first, full, length, n


@triton.jit
def is_stored(entry, count, first, full, BLOCK_SIZE: tl.constexpr):
    """Whether the token position of an entry is stored; it follows from its number otherwise."""
    column = full + entry // BLOCK_SIZE - count
    return (entry < count * BLOCK_SIZE) | (column < first)


@triton.jit
def dealt_layer(
    entry, count, offset, first, full, layer, HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """Numbers, among all, of the layers in whose caches entries lie, where layers share."""
    index = entry // BLOCK_SIZE
    each = tl.maximum(full - first, 1) * HEADS  # sub-blocks that a layer has to deal
    return tl.where(index < count, (offset + index) // each, layer)


@triton.jit
def entry_offset(
    row_ptr,
    entry,
    mask,
    count,
    offset,
    first,
    full,
    head,
    stride_block,
    stride_head,
    stride_token,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SHARED: tl.constexpr = False,
):
    """Elements from the start of a layer's cache to the K of entries (V: d elements further).

    `entry` is a block of entry numbers of `head`, `mask` tells the valid ones; `row_ptr` points to
    the request's block row. int64, 0 based on block 0 where masked. SHARED: the layer is that of
    `dealt_layer`.
    """
    index = entry // BLOCK_SIZE
    dealt = offset + index
    kept = index < count
    if SHARED:
        dealt = dealt % (tl.maximum(full - first, 1) * HEADS)
    column = tl.where(kept, first + dealt // HEADS, full + index - count)
    inside = tl.where(kept, dealt % HEADS, head)
    block = tl.load(row_ptr + column, mask=mask, other=0).to(tl.int64)
    return block * stride_block + inside * stride_head + (entry % BLOCK_SIZE) * stride_token


@triton.jit
def cache_offset(
    layers_ptr,
    own,
    layer,
    row_ptr,
    entry,
    mask,
    count,
    offset,
    first,
    full,
    head,
    stride_block,
    stride_head,
    stride_token,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ITEM: tl.constexpr,
    SHARED: tl.constexpr,
):
    """`entry_offset` from the start of the cache of `layer`, also to entries in other layers'.

    `layers_ptr` points to the addresses of the caches of all layers and `own` is that of `layer`,
    both multiples of 16; ITEM: bytes of an element. All three are only looked at if SHARED.
    """
    at = entry_offset(
        row_ptr, entry, mask, count, offset, first, full, head,
        stride_block, stride_head, stride_token, HEADS, BLOCK_SIZE, SHARED,
    )  # fmt: skip
    if SHARED:
        where = dealt_layer(entry, count, offset, first, full, layer, HEADS, BLOCK_SIZE)
        there = tl.load(layers_ptr + where, mask=mask, other=0)
        # Written so that the compiler sees: a multiple of 16 bytes.
        at += tl.where(mask, there - own, 0) // 16 * (16 // ITEM)
    return at


@triton.jit
def position_offset(
    start,
    layer,
    num_blocks,
    row_ptr,
    entry,
    mask,
    count,
    offset,
    first,
    full,
    head,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Places of entries in a table `[layers, num_blocks, HEADS, BLOCK_SIZE]`.

    `layer` counts from the first layer of the table, which is number `start` of all; SHARED:
    entries can lie before it.
    """
    at = entry_offset(
        row_ptr, entry, mask, count, offset, first, full, head,
        HEADS * BLOCK_SIZE, BLOCK_SIZE, 1, HEADS, BLOCK_SIZE, SHARED,
    )  # fmt: skip
    where = layer
    if SHARED:
        all_layer = start + layer
        where = dealt_layer(entry, count, offset, first, full, all_layer, HEADS, BLOCK_SIZE) - start
    return at + where.to(tl.int64) * num_blocks * (HEADS * BLOCK_SIZE)
