"""Device side of the choice of entries; see `launch.py` for shapes."""

import triton
import triton.language as tl

from uncomp.kernels.paged.kernel import head_of_program, is_stored, position_offset

#: sign bit of an int32; below every key
SIGN = tl.constexpr(-(2**31))
TOP_DIGIT = tl.constexpr(-(2**24))
#: integers that differ from launch to launch and must not cause another compilation
VARYING = [
    "num_rows", "num_slots", "num_blocks", "num_spans", "first_layer", "sinks", "window",
]  # fmt: skip


@triton.jit
def forced_tile(
    entry, eligible, positions_ptr, row_ptr, protect_ptr,
    number, num_blocks, head, count, offset, first, full, length, n, sinks, window, num_spans,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Which of these entries stay in any case. `positions_ptr`: of the layer, which is number
    `number` of all.

    Entry e has a position of at least e, so that without spans to protect only the first `sinks`
    positions need be known.
    """
    candidate = entry < eligible
    wanted = candidate & (entry < sinks + num_spans * eligible)  # all if there are spans
    kept = is_stored(entry, count, first, full, BLOCK_SIZE)
    at = position_offset(
        number, number * 0, num_blocks, row_ptr, entry, wanted & kept, count, offset, first, full,
        head, HEADS, BLOCK_SIZE, SHARED,
    )  # fmt: skip
    stored = tl.load(positions_ptr + at, mask=wanted & kept, other=0)
    position = tl.where(kept, stored, length - n + entry)
    forced = (wanted & (position < sinks)) | (entry >= n - window)
    for span in range(num_spans):
        begin = tl.load(protect_ptr + span * 2)
        end = tl.load(protect_ptr + span * 2 + 1)
        forced |= (position >= begin) & (position < end)
    return forced & candidate


@triton.jit(do_not_specialize=VARYING)
def limits_kernel(
    blocks_ptr, lengths_ptr, slots_ptr, counts_ptr, offsets_ptr, spans_ptr, positions_ptr,
    full_ptr, protect_ptr, eligible_ptr, forced_ptr,
    num_rows, num_slots, num_blocks, stride_row, num_spans, first_layer, sinks, window,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, SHARED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Eligible and forced entries of a head. Grid (L R H)."""
    layer, row, head, count, offset, first, full, length, n = head_of_program(
        lengths_ptr, slots_ptr, counts_ptr, offsets_ptr, spans_ptr, num_rows, num_slots,
        HEADS, BLOCK_SIZE,
    )  # fmt: skip
    eligible = tl.maximum(n - length + tl.load(full_ptr + row) * BLOCK_SIZE, 0)
    row_ptr = blocks_ptr + row.to(tl.int64) * stride_row
    positions_ptr += layer.to(tl.int64) * num_blocks * HEADS * BLOCK_SIZE
    stay = 0
    for start in range(0, eligible, TILE):
        # Without spans nothing between the sinks and the window is forced.
        if (num_spans > 0) | (start < sinks) | (start + TILE > n - window):
            entry = start + tl.arange(0, TILE)
            forced = forced_tile(
                entry, eligible, positions_ptr, row_ptr, protect_ptr + row * num_spans * 2,
                first_layer + layer, num_blocks, head, count, offset, first, full, length, n,
                sinks, window, num_spans, HEADS, BLOCK_SIZE, SHARED,
            )  # fmt: skip
            stay += tl.sum(forced.to(tl.int32), 0)
    tl.store(eligible_ptr + tl.program_id(0), eligible)
    tl.store(forced_ptr + tl.program_id(0), stay)


@triton.jit(do_not_specialize=["num_rows", "num_slots", "window"])
def pool_kernel(
    raw_ptr, out_ptr, lengths_ptr, slots_ptr, counts_ptr, offsets_ptr, spans_ptr,
    num_rows, num_slots, entries, window,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Largest score of the neighbourhood, NaN if one is NaN. Grid (L R H, tiles of entries)."""
    _layer, _row, _head, _count, _offset, _first, _full, _length, n = head_of_program(
        lengths_ptr, slots_ptr, counts_ptr, offsets_ptr, spans_ptr, num_rows, num_slots,
        HEADS, BLOCK_SIZE,
    )  # fmt: skip
    start = tl.program_id(1) * TILE
    if start >= n:
        return
    n = tl.minimum(n, entries)
    limit = n - window
    entry = start + tl.arange(0, TILE)
    raw_ptr += tl.program_id(0).to(tl.int64) * entries
    out_ptr += tl.program_id(0).to(tl.int64) * entries
    best = tl.full((TILE,), float("-inf"), tl.float32)
    for shift in range(WIDTH):
        near = entry + shift - WIDTH // 2
        score = tl.load(raw_ptr + near, mask=(near >= 0) & (near < limit), other=float("-inf"))
        best = tl.maximum(best, score, propagate_nan=tl.PropagateNan.ALL)
    best = tl.where(entry < limit, best, float("-inf"))
    tl.store(out_ptr + entry, best, mask=entry < n)


@triton.jit(do_not_specialize=VARYING)
def places_kernel(
    places_ptr, out_ptr,
    blocks_ptr, lengths_ptr, slots_ptr, counts_ptr, offsets_ptr, spans_ptr, positions_ptr,
    num_rows, num_slots, num_blocks, entries, width, stride_row, first_layer,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, SHARED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Place of every entry, from that of every position. Grid (L R H, tiles of entries)."""
    layer, row, head, count, offset, first, full, length, n = head_of_program(
        lengths_ptr, slots_ptr, counts_ptr, offsets_ptr, spans_ptr, num_rows, num_slots,
        HEADS, BLOCK_SIZE,
    )  # fmt: skip
    n = tl.minimum(n, entries)
    start = tl.program_id(1) * TILE
    if start >= n:
        return
    entry = start + tl.arange(0, TILE)
    kept = (entry < n) & is_stored(entry, count, first, full, BLOCK_SIZE)
    at = position_offset(
        first_layer + layer, layer * 0, num_blocks, blocks_ptr + row.to(tl.int64) * stride_row,
        entry, kept, count, offset, first, full, head, HEADS, BLOCK_SIZE, SHARED,
    )  # fmt: skip
    positions_ptr += layer.to(tl.int64) * num_blocks * HEADS * BLOCK_SIZE
    position = tl.load(positions_ptr + at, mask=kept, other=0)
    position = tl.where(kept, position, length - n + entry)
    known = (entry < n) & (position < width)
    found = tl.load(places_ptr + row.to(tl.int64) * width + position, mask=known, other=0)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * entries + entry, found, mask=entry < n)


@triton.jit(do_not_specialize=["num_rows", "num_slots", "window"])
def ema_kernel(
    raw_ptr, out_ptr, places_ptr, lengths_ptr, slots_ptr, counts_ptr, offsets_ptr, spans_ptr,
    num_rows, num_slots, entries, window,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, AFTER: tl.constexpr, BEFORE: tl.constexpr,
    AFTER_RATE: tl.constexpr, BEFORE_RATE: tl.constexpr, APART: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Exponential moving average to both sides. Grid (L R H, tiles of entries).

    A score reaches AFTER entries on and BEFORE back, its own included; rates are binary logarithms
    a step. What is farther away, and smaller, is added first. APART: steps are between places
    (`places_ptr` is like `raw_ptr`, and not read otherwise), and fewer than APART; 0: between
    entries.
    """
    _layer, _row, _head, _count, _offset, _first, _full, _length, n = head_of_program(
        lengths_ptr, slots_ptr, counts_ptr, offsets_ptr, spans_ptr, num_rows, num_slots,
        HEADS, BLOCK_SIZE,
    )  # fmt: skip
    start = tl.program_id(1) * TILE
    if start >= n:
        return
    n = tl.minimum(n, entries)
    limit = n - window
    entry = start + tl.arange(0, TILE)
    raw_ptr += tl.program_id(0).to(tl.int64) * entries
    out_ptr += tl.program_id(0).to(tl.int64) * entries
    places_ptr += tl.program_id(0).to(tl.int64) * entries
    own = entry * 0
    pooled = entry < limit
    if APART > 0:
        own = tl.load(places_ptr + entry, mask=pooled, other=0)
    total = tl.zeros((TILE,), tl.float32)
    for step in range(1, BEFORE):
        near = entry + BEFORE - step
        within = (near < limit) & pooled
        far = near - entry
        if APART > 0:
            far = tl.where(within, tl.load(places_ptr + near, mask=within, other=0) - own, 0)
            within &= far < APART
        score = tl.load(raw_ptr + near, mask=within, other=0.0)
        total += score * tl.exp2(-BEFORE_RATE * far.to(tl.float32))
    ahead = tl.zeros((TILE,), tl.float32)
    for step in range(1, AFTER + 1):
        near = entry - AFTER + step
        within = (near >= 0) & (near < limit) & pooled
        far = entry - near
        if APART > 0:
            far = tl.where(within, own - tl.load(places_ptr + near, mask=within, other=0), 0)
            within &= far < APART
        score = tl.load(raw_ptr + near, mask=within, other=0.0)
        ahead += score * tl.exp2(-AFTER_RATE * far.to(tl.float32))
    total = tl.where(pooled, total + ahead, float("-inf"))
    tl.store(out_ptr + entry, total, mask=entry < n)


@triton.jit
def order_key(score):
    """int32 of the same order as the float32 score; NaN as -inf, -0 as 0."""
    score = tl.where((score != score), float("-inf"), tl.where(score == 0, 0.0, score))
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def candidate_tile(
    start, raw_ptr, pooled_ptr, eligible, positions_ptr, row_ptr, protect_ptr,
    number, num_blocks, head, count, offset, first, full, length, n, sinks, window, num_spans,
    SECOND: tl.constexpr, HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, SHARED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Keys of a tile (pooled, and raw if SECOND), which entries compete and which are forced."""
    entry = start + tl.arange(0, TILE)
    forced = forced_tile(
        entry, eligible, positions_ptr, row_ptr, protect_ptr, number, num_blocks, head, count,
        offset, first, full, length, n, sinks, window, num_spans, HEADS, BLOCK_SIZE, SHARED,
    )  # fmt: skip
    free = (entry < eligible) & (forced == 0)
    pooled = order_key(tl.load(pooled_ptr + entry, mask=free, other=0.0))
    raw = pooled
    if SECOND:
        raw = order_key(tl.load(raw_ptr + entry, mask=free, other=0.0))
    return entry, pooled, raw, free, forced


@triton.jit
def threshold(
    need, outer, raw_ptr, pooled_ptr, eligible, positions_ptr, row_ptr, protect_ptr,
    number, num_blocks, head, count, offset, first, full, length, n, sinks, window, num_spans,
    SECOND: tl.constexpr, HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, SHARED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Key of the need-th best candidate, how many of that key are among the `need` best, and how
    many there are. SECOND: raw keys of the candidates whose pooled key is `outer`.

    Eight bits at a time from the top: a histogram of the next digit of the candidates that share
    the digits found so far. The sign bit is flipped, so that digits order like the keys. Nothing
    needed gives the largest key and 0 of it: no candidate is better.
    """
    digits = tl.arange(0, 256)
    found = need * 0  # digits so far; as many dimensions and the type of `need`
    mask = need * 0  # bits that they occupy
    equal = need * 0
    for turn in range(4):
        shift = 24 - 8 * turn
        histogram = tl.zeros((256,), tl.int32)
        for start in range(0, eligible, TILE):
            _entry, pooled, raw, free, _forced = candidate_tile(
                start, raw_ptr, pooled_ptr, eligible, positions_ptr, row_ptr, protect_ptr,
                number, num_blocks, head, count, offset, first, full, length, n, sinks, window,
                num_spans, SECOND, HEADS, BLOCK_SIZE, SHARED, TILE,
            )  # fmt: skip
            if SECOND:
                free = free & (pooled == outer)
            key = raw ^ SIGN
            free = free & ((key & mask) == found)
            histogram += tl.histogram((key >> shift) & 255, 256, mask=free)
        above = tl.sum(histogram, 0) - tl.cumsum(histogram, 0)
        digit = tl.max(tl.where(above + histogram >= need, digits, 0), 0)
        need -= tl.sum(tl.where(digits == digit, above, 0), 0)
        equal = tl.sum(tl.where(digits == digit, histogram, 0), 0)
        found |= digit << shift
        mask = (mask >> 8) | TOP_DIGIT  # an arithmetic shift
    return found ^ SIGN, need, equal


@triton.jit(do_not_specialize=VARYING)
def choose_kernel(
    raw_ptr, pooled_ptr, chosen_ptr, kept_ptr, starts_ptr,
    blocks_ptr, lengths_ptr, slots_ptr, counts_ptr, offsets_ptr, spans_ptr, positions_ptr,
    full_ptr, protect_ptr,
    num_rows, num_slots, num_blocks, entries, width, stride_row, num_spans, first_layer, sinks,
    window,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, SHARED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the entries of a head that stay, ascending. Grid (L R H).

    `kept_ptr`, `starts_ptr`: sub-blocks that the head shall have and those of the heads before it;
    `counts_ptr`, `offsets_ptr` are what it holds now.
    """
    layer, row, head, count, offset, first, full, length, n = head_of_program(
        lengths_ptr, slots_ptr, counts_ptr, offsets_ptr, spans_ptr, num_rows, num_slots,
        HEADS, BLOCK_SIZE,
    )  # fmt: skip
    number = first_layer + layer
    keep = tl.load(kept_ptr + tl.program_id(0)) * BLOCK_SIZE
    if keep <= 0:
        return
    eligible = tl.maximum(n - length + tl.load(full_ptr + row) * BLOCK_SIZE, 0)
    eligible = tl.minimum(eligible, entries)
    row_ptr = blocks_ptr + row.to(tl.int64) * stride_row
    positions_ptr += layer.to(tl.int64) * num_blocks * HEADS * BLOCK_SIZE
    protect_ptr += row * num_spans * 2
    raw_ptr += tl.program_id(0).to(tl.int64) * entries
    pooled_ptr += tl.program_id(0).to(tl.int64) * entries

    stay = 0
    for start in range(0, eligible, TILE):
        if (num_spans > 0) | (start < sinks) | (start + TILE > n - window):
            forced = forced_tile(
                start + tl.arange(0, TILE), eligible, positions_ptr, row_ptr, protect_ptr,
                number, num_blocks, head, count, offset, first, full, length, n, sinks, window,
                num_spans, HEADS, BLOCK_SIZE, SHARED,
            )  # fmt: skip
            stay += tl.sum(forced.to(tl.int32), 0)
    pooled_key, need, equal = threshold(
        tl.maximum(keep - stay, 0), 0, raw_ptr, pooled_ptr, eligible, positions_ptr, row_ptr,
        protect_ptr, number, num_blocks, head, count, offset, first, full, length, n, sinks,
        window, num_spans, False, HEADS, BLOCK_SIZE, SHARED, TILE,
    )  # fmt: skip
    raw_key = need * 0 + SIGN  # all that are equal: every raw key is at least this
    if need < equal:
        raw_key, need, equal = threshold(
            need, pooled_key, raw_ptr, pooled_ptr, eligible, positions_ptr, row_ptr,
            protect_ptr, number, num_blocks, head, count, offset, first, full, length, n, sinks,
            window, num_spans, True, HEADS, BLOCK_SIZE, SHARED, TILE,
        )  # fmt: skip

    begin = tl.load(starts_ptr + tl.program_id(0)) * BLOCK_SIZE
    chosen_ptr += (layer * num_rows + row).to(tl.int64) * width
    written = 0
    ties = 0
    for start in range(0, eligible, TILE):
        entry, pooled, raw, free, forced = candidate_tile(
            start, raw_ptr, pooled_ptr, eligible, positions_ptr, row_ptr, protect_ptr,
            number, num_blocks, head, count, offset, first, full, length, n, sinks, window,
            num_spans, True, HEADS, BLOCK_SIZE, SHARED, TILE,
        )  # fmt: skip
        level = free & (pooled == pooled_key)
        tied = (level & (raw == raw_key)).to(tl.int32)
        better = free & (pooled > pooled_key) | (level & (raw > raw_key))
        early = (tied > 0) & (ties + tl.cumsum(tied, 0) <= need)
        taken = (forced | better | early).to(tl.int32)
        place = written + tl.cumsum(taken, 0) - 1
        inside = (taken > 0) & (place < keep) & (begin + place < width)
        tl.store(chosen_ptr + begin + place, entry, mask=inside)
        written += tl.sum(taken, 0)
        ties += tl.sum(tied, 0)
