"""Two passes of compaction: chosen entries to a buffer, the buffer to the dealt sub-blocks.

Entries are copied as 32-bit words, whatever the dtype of the cache. Integers of the launch are not
specialised and addresses carry their alignment here: one compiled kernel for a cache geometry.
"""

import triton
import triton.language as tl

from uncomp.kernels.paged.kernel import (
    cache_offset,
    head_length,
    head_state,
    is_stored,
    position_offset,
)


@triton.jit
def _used(
    counts_ptr, offsets_ptr, begins_ptr, kept_count_ptr, at, row, all_layers,
    HEADS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Dealt sub-blocks of a layer and request, never more than the blocks have; and their first."""
    last = at * HEADS + HEADS - 1
    used = tl.load(offsets_ptr + last) + tl.load(counts_ptr + last)
    room = tl.load(kept_count_ptr + row) * HEADS
    begin = row * 0
    if SHARED:
        begin = tl.maximum(tl.load(begins_ptr + at), 0)
        room = room * all_layers - begin
    return tl.maximum(tl.minimum(used, room), 0), begin


@triton.jit
def _head_of(counts_ptr, offsets_ptr, at, dealt, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr):
    """Heads that the dealt sub-blocks belong to."""
    heads = tl.arange(0, PADDED_HEADS)
    real = heads < HEADS
    ends = tl.load(offsets_ptr + at * HEADS + heads, mask=real, other=0)
    ends += tl.load(counts_ptr + at * HEADS + heads, mask=real, other=0)
    before = (ends[None, :] <= dealt[:, None]) & real[None, :]
    # Beyond the last head where nothing is dealt: the clamp keeps masked addresses in the table.
    return tl.minimum(tl.sum(before.to(tl.int32), axis=1), HEADS - 1)


@triton.jit(do_not_specialize=list(range(16, 24)), do_not_specialize_on_alignment=list(range(16)))
def gather_kernel(
    pointers_ptr,
    layers_ptr,
    begins_ptr,
    positions_ptr,
    blocks_ptr,
    lengths_ptr,
    slots_ptr,
    held_counts_ptr,
    held_offsets_ptr,
    spans_ptr,
    chosen_ptr,
    counts_ptr,
    offsets_ptr,
    kept_count_ptr,
    words_ptr,
    places_ptr,
    layer_start,
    num_slots,
    num_blocks,
    row_stride,
    chosen_stride,
    width,
    start,
    all_layers,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    STRIDE_BLOCK: tl.constexpr,
    STRIDE_HEAD: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr,
    SHARED: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    PADDED_WORDS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Grid (entries / ENTRIES, R, layers of this group). Strides and sizes in 32-bit words.

    `words_ptr` [layers of this group, R, width, WORDS] and `places_ptr` (the same without WORDS)
    receive the entries in dealt order. SHARED: `layers_ptr` points to the addresses of all
    `all_layers` layers, of which these begin at number `start`; `begins_ptr` [L, R]: first number
    of each layer's dealt list.
    """
    row = tl.program_id(1)
    requests = tl.num_programs(1)
    layer = layer_start + tl.program_id(2)
    at = layer * requests + row
    used, _begin = _used(
        counts_ptr, offsets_ptr, begins_ptr, kept_count_ptr, at, row, all_layers, HEADS, SHARED
    )
    used = tl.minimum(used * BLOCK_SIZE, width)
    if tl.program_id(0) * ENTRIES >= used:
        return
    local = tl.arange(0, ENTRIES)
    number = tl.program_id(0) * ENTRIES + local
    dealt = number < used
    head = _head_of(counts_ptr, offsets_ptr, at, number // BLOCK_SIZE, HEADS, PADDED_HEADS)
    # One slot an entry: the interpreter takes no scalar mask for a block of heads.
    slot = tl.load(slots_ptr + row) + tl.zeros_like(head)
    count, offset, first, full = head_state(
        held_counts_ptr, held_offsets_ptr, spans_ptr, layer, slot, head, num_slots, HEADS
    )
    entry = tl.load(chosen_ptr + at.to(tl.int64) * chosen_stride + number, mask=dealt, other=0)
    # A wrong entry number must not become a wrong address.
    held = head_length(tl.load(lengths_ptr + row), count, full, BLOCK_SIZE)
    valid = dealt & (entry >= 0) & (entry < held)
    blocks = blocks_ptr + row.to(tl.int64) * row_stride

    own = tl.load(pointers_ptr + layer)
    source = cache_offset(
        layers_ptr,
        own,
        start + layer,
        blocks,
        entry,
        valid,
        count,
        offset,
        first,
        full,
        head,
        STRIDE_BLOCK,
        STRIDE_HEAD,
        STRIDE_TOKEN,
        HEADS,
        BLOCK_SIZE,
        4,
        SHARED,
    )
    cache = tl.multiple_of(own.to(tl.pointer_type(tl.int32)), 16)
    word = tl.arange(0, PADDED_WORDS)
    inside = (word < WORDS)[None, :]
    copied = tl.load(cache + source[:, None] + word[None, :], mask=valid[:, None] & inside, other=0)
    line = (tl.program_id(2) * requests + row).to(tl.int64) * width + tl.program_id(0) * ENTRIES
    target = tl.multiple_of(words_ptr + line * WORDS, 16)
    tl.store(target + local[:, None] * WORDS + word[None, :], copied, mask=dealt[:, None] & inside)

    stored = position_offset(
        start,
        layer,
        num_blocks,
        blocks,
        entry,
        valid,
        count,
        offset,
        first,
        full,
        head,
        HEADS,
        BLOCK_SIZE,
        SHARED,
    )
    kept = valid & is_stored(entry, count, first, full, BLOCK_SIZE)
    place = tl.load(positions_ptr + stored, mask=kept, other=0)
    place = tl.where(kept, place, entry + (full - count) * BLOCK_SIZE)
    tl.store(places_ptr + line + local, place, mask=dealt)


@triton.jit(do_not_specialize=list(range(10, 16)), do_not_specialize_on_alignment=list(range(10)))
def scatter_kernel(
    pointers_ptr,
    layers_ptr,
    begins_ptr,
    positions_ptr,
    kept_blocks_ptr,
    counts_ptr,
    offsets_ptr,
    kept_count_ptr,
    words_ptr,
    places_ptr,
    layer_start,
    num_blocks,
    kept_stride,
    width,
    start,
    all_layers,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    STRIDE_BLOCK: tl.constexpr,
    STRIDE_HEAD: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr,
    SHARED: tl.constexpr,
    PADDED_WORDS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Grid and buffers of `gather_kernel`."""
    row = tl.program_id(1)
    requests = tl.num_programs(1)
    layer = layer_start + tl.program_id(2)
    at = layer * requests + row
    used, begin = _used(
        counts_ptr, offsets_ptr, begins_ptr, kept_count_ptr, at, row, all_layers, HEADS, SHARED
    )
    limit = tl.minimum(used * BLOCK_SIZE, width)
    if tl.program_id(0) * ENTRIES >= limit:
        return
    local = tl.arange(0, ENTRIES)
    number = tl.program_id(0) * ENTRIES + local
    dealt = number < limit
    # The dealt list is what one head that keeps every sub-block from column 0 on would hold.
    blocks = kept_blocks_ptr + row.to(tl.int64) * kept_stride
    each = tl.load(kept_count_ptr + row)
    own = tl.load(pointers_ptr + layer)
    goal = cache_offset(
        layers_ptr,
        own,
        start + layer,
        blocks,
        number,
        dealt,
        used,
        begin,
        0,
        each,
        0,
        STRIDE_BLOCK,
        STRIDE_HEAD,
        STRIDE_TOKEN,
        HEADS,
        BLOCK_SIZE,
        4,
        SHARED,
    )
    cache = tl.multiple_of(own.to(tl.pointer_type(tl.int32)), 16)
    word = tl.arange(0, PADDED_WORDS)
    mask = dealt[:, None] & (word < WORDS)[None, :]
    line = (tl.program_id(2) * requests + row).to(tl.int64) * width + tl.program_id(0) * ENTRIES
    source = tl.multiple_of(words_ptr + line * WORDS, 16)
    copied = tl.load(source + local[:, None] * WORDS + word[None, :], mask=mask, other=0)
    tl.store(cache + goal[:, None] + word[None, :], copied, mask=mask)

    stored = position_offset(
        start,
        layer,
        num_blocks,
        blocks,
        number,
        dealt,
        used,
        begin,
        0,
        each,
        0,
        HEADS,
        BLOCK_SIZE,
        SHARED,
    )
    place = tl.load(places_ptr + line + local, mask=dealt, other=0)
    tl.store(positions_ptr + stored, place, mask=dealt)
