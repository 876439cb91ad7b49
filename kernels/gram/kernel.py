"""Device side of the covariance statistics; see `launch.py` for shapes."""

import triton
import triton.language as tl

from uncomp.kernels.paged.kernel import cache_offset, head_length, head_state


@triton.jit
def sample_numbers(n, SAMPLE: tl.constexpr):
    """At most SAMPLE row numbers below `n`, evenly spaced; their mask; how many, as float32."""
    t = tl.arange(0, SAMPLE)
    numbers = tl.where(n > SAMPLE, (t.to(tl.int64) * n // SAMPLE).to(tl.int32), t)
    return numbers, t < n, tl.maximum(tl.minimum(n, SAMPLE), 1).to(tl.float32)


@triton.jit
def sample_mean(pointers, mask, number):
    """Mean over the rows of a tile. Exact where all rows are equal (16-bit and 8-bit values), so
    that a head without spread gets zero statistics and not rounding noise."""
    values = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(values, 0)
    return tl.div_rn(total, tl.zeros_like(total) + number)


@triton.jit
def centred(pointers, mask, shift):
    """Rows of a tile minus the shift, float32, 0 where masked."""
    values = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, values - shift[None, :], 0.0)


@triton.jit
def add_products(outer, left, right, DOT_TYPE: tl.constexpr):
    """outer + leftᵀ right for float32 tiles, with three bf16 products instead of one in float32.

    x = high + low holds to 2^-17 |x|; low times low, 2^-18 of the product, is left out. bf16 has
    the range of float32 and runs on the matrix units of every target. DOT_TYPE is bf16; the
    interpreter cannot multiply bf16 and takes the same rounded values as float32.
    """
    left_high = left.to(tl.bfloat16)
    left_low = (left - left_high.to(tl.float32)).to(tl.bfloat16)
    right_high = right.to(tl.bfloat16)
    right_low = (right - right_high.to(tl.float32)).to(tl.bfloat16)
    left_high = tl.trans(left_high).to(DOT_TYPE)
    left_low = tl.trans(left_low).to(DOT_TYPE)
    right_high = right_high.to(DOT_TYPE)
    right_low = right_low.to(DOT_TYPE)
    outer = tl.dot(left_low, right_high, outer, input_precision="ieee")
    outer = tl.dot(left_high, right_low, outer, input_precision="ieee")
    return tl.dot(left_high, right_high, outer, input_precision="ieee")


@triton.jit
def store_statistics(
    shift_ptr, outer_ptr, total_ptr, count_ptr,
    at, row, col, lines, columns, shift, outer, total, n, scale, seen,
    HEAD_SIZE: tl.constexpr,
):  # fmt: skip
    """Write tile (row, col) and its mirror image of matrix `at`, times scale²; `seen` > 0: add.

    Programs on the diagonal write the vectors, and the shift is not written while it is being read:
    no program touches what another one writes.
    """
    left_in = lines < HEAD_SIZE
    right_in = columns < HEAD_SIZE
    inside = left_in[:, None] & right_in[None, :]
    add = tl.zeros_like(columns) + seen > 0  # as wide as the other masks, for the interpreter
    outer_ptr += at * HEAD_SIZE * HEAD_SIZE
    upper = outer_ptr + lines[:, None] * HEAD_SIZE + columns[None, :]
    result = outer * scale * scale
    result += tl.load(upper, mask=inside & add[None, :], other=0.0)
    tl.store(upper, result, mask=inside)
    if row == col:
        place = at * HEAD_SIZE + columns
        sums = total * scale + tl.load(total_ptr + place, mask=right_in & add, other=0.0)
        tl.store(total_ptr + place, sums, mask=right_in)
        tl.store(shift_ptr + place, shift * scale, mask=right_in & (add == 0))
    else:
        lower = outer_ptr + columns[None, :] * HEAD_SIZE + lines[:, None]
        tl.store(lower, result, mask=inside)
    if (row == 0) & (col == 0):
        before = tl.load(count_ptr + at, mask=seen > 0, other=0)
        tl.store(count_ptr + at, before + n)


@triton.jit(do_not_specialize=["first_layer"])
def gram_paged_kernel(
    pointers_ptr, layers_ptr, scales_ptr, blocks_ptr, lengths_ptr, slots_ptr, counts_ptr,
    offsets_ptr, spans_ptr, stride_ptr, shift_ptr, outer_ptr, total_ptr, count_ptr,
    num_slots, first_layer, stride_row, stride_block, stride_head, stride_token,
    CACHE_TYPE: tl.constexpr, ITEM: tl.constexpr, SHARED: tl.constexpr,
    DOT_TYPE: tl.constexpr, HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, SAMPLE: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Statistics of the keys a head holds. Grid (TILES² H, R, L), TILES = d / TILE rounded up."""
    TILES: tl.constexpr = (HEAD_SIZE + TILE - 1) // TILE
    pair = tl.program_id(0) % (TILES * TILES)
    head = tl.program_id(0) // (TILES * TILES)
    request = tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    row = pair // TILES
    col = pair % TILES
    stride = tl.load(stride_ptr + request)
    if (col < row) | (stride < 1):  # the matrix is symmetric; a request left alone
        return
    slot = tl.load(slots_ptr + request)
    count, offset, first, full = head_state(
        counts_ptr, offsets_ptr, spans_ptr, layer, slot, head, num_slots, HEADS
    )
    length = head_length(tl.load(lengths_ptr + request), count, full, BLOCK_SIZE)
    n = tl.maximum((length + stride - 1) // stride, 0)
    own = tl.load(pointers_ptr + layer)
    cache = tl.multiple_of(own.to(tl.pointer_type(CACHE_TYPE)), 16)  # checked by the launcher
    row_ptr = blocks_ptr + request.to(tl.int64) * stride_row
    lines = row * TILE + tl.arange(0, TILE)
    columns = col * TILE + tl.arange(0, TILE)

    left_in = lines[None, :] < HEAD_SIZE
    right_in = columns[None, :] < HEAD_SIZE
    picked, sampled, number = sample_numbers(n, SAMPLE)
    sample_at = cache_offset(
        layers_ptr, own, first_layer + layer, row_ptr, picked * stride, sampled, count, offset,
        first, full, head, stride_block, stride_head, stride_token, HEADS, BLOCK_SIZE, ITEM, SHARED,
    )  # fmt: skip
    sample = cache + sample_at[:, None]
    left_shift = sample_mean(sample + lines[None, :], sampled[:, None] & left_in, number)
    right_shift = left_shift
    if row != col:
        right_shift = sample_mean(sample + columns[None, :], sampled[:, None] & right_in, number)

    outer = tl.zeros((TILE, TILE), dtype=tl.float32)
    total = tl.zeros((TILE,), dtype=tl.float32)
    for start in range(0, n, ROWS):
        numbers = start + tl.arange(0, ROWS)
        valid = numbers < n
        at = cache_offset(
            layers_ptr, own, first_layer + layer, row_ptr, numbers * stride, valid, count, offset,
            first, full, head, stride_block, stride_head, stride_token, HEADS, BLOCK_SIZE, ITEM,
            SHARED,
        )  # fmt: skip
        base = cache + at[:, None]
        left = centred(base + lines[None, :], valid[:, None] & left_in, left_shift)
        right = left
        if TILES > 1:
            right = centred(base + columns[None, :], valid[:, None] & right_in, right_shift)
        outer = add_products(outer, left, right, DOT_TYPE)
        total += tl.sum(right, 0)

    matrix = (layer * tl.num_programs(1) + request) * HEADS + head
    store_statistics(
        shift_ptr, outer_ptr, total_ptr, count_ptr, matrix, row, col, lines, columns,
        right_shift, outer, total, n, tl.load(scales_ptr + layer * 2), 0, HEAD_SIZE,
    )  # fmt: skip


@triton.jit
def gram_rows_kernel(
    x_ptr, starts_ptr, seen_ptr, stride_ptr, shift_ptr, outer_ptr, total_ptr, count_ptr,
    stride_token, stride_head,
    DOT_TYPE: tl.constexpr, HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, SAMPLE: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The same for rows that lie in a dense tensor, added to what is there. Grid (TILES² H, R)."""
    TILES: tl.constexpr = (HEAD_SIZE + TILE - 1) // TILE
    pair = tl.program_id(0) % (TILES * TILES)
    head = tl.program_id(0) // (TILES * TILES)
    request = tl.program_id(1)
    row = pair // TILES
    col = pair % TILES
    stride = tl.load(stride_ptr + request)
    if (col < row) | (stride < 1):
        return
    seen = tl.load(seen_ptr + request)
    begin = tl.load(starts_ptr + request)
    length = tl.load(starts_ptr + request + 1) - begin
    phase = (stride - seen % stride) % stride  # first row whose number in the stream counts
    n = tl.maximum((length - phase + stride - 1) // stride, 0)
    base = x_ptr + (begin + phase).to(tl.int64) * stride_token + head * stride_head
    step = stride.to(tl.int64) * stride_token
    lines = row * TILE + tl.arange(0, TILE)
    columns = col * TILE + tl.arange(0, TILE)
    matrix = request.to(tl.int64) * HEADS + head
    left_in = lines < HEAD_SIZE
    right_in = columns < HEAD_SIZE

    if seen > 0:
        left_shift = tl.load(shift_ptr + matrix * HEAD_SIZE + lines, mask=left_in, other=0.0)
        right_shift = tl.load(shift_ptr + matrix * HEAD_SIZE + columns, mask=right_in, other=0.0)
    else:
        picked, sampled, number = sample_numbers(n, SAMPLE)
        sample = base + picked.to(tl.int64)[:, None] * step
        left_mask = sampled[:, None] & left_in[None, :]
        right_mask = sampled[:, None] & right_in[None, :]
        left_shift = sample_mean(sample + lines[None, :], left_mask, number)
        right_shift = sample_mean(sample + columns[None, :], right_mask, number)

    outer = tl.zeros((TILE, TILE), dtype=tl.float32)
    total = tl.zeros((TILE,), dtype=tl.float32)
    for start in range(0, n, ROWS):
        numbers = start + tl.arange(0, ROWS)
        valid = (numbers < n)[:, None]
        tile = base + numbers.to(tl.int64)[:, None] * step
        left = centred(tile + lines[None, :], valid & left_in[None, :], left_shift)
        right = left
        if TILES > 1:
            right = centred(tile + columns[None, :], valid & right_in[None, :], right_shift)
        outer = add_products(outer, left, right, DOT_TYPE)
        total += tl.sum(right, 0)

    store_statistics(
        shift_ptr, outer_ptr, total_ptr, count_ptr, matrix, row, col, lines, columns,
        right_shift, outer, total, n, 1.0, seen, HEAD_SIZE,
    )  # fmt: skip


@triton.jit
def covariance_kernel(
    shift_ptr, outer_ptr, total_ptr, count_ptr, covariance_ptr,
    HEAD_SIZE: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Tile (row, col) of matrix m: (S/n - μ μᵀ) / trace. Grid (TILES², matrices)."""
    TILES: tl.constexpr = (HEAD_SIZE + TILE - 1) // TILE
    row = tl.program_id(0) // TILES
    col = tl.program_id(0) % TILES
    at = tl.program_id(1).to(tl.int64)
    n = tl.maximum(tl.load(count_ptr + at), 1).to(tl.float32)
    outer_ptr += at * HEAD_SIZE * HEAD_SIZE
    total_ptr += at * HEAD_SIZE

    every = tl.arange(0, PADDED)
    inside = every < HEAD_SIZE
    moment = tl.load(outer_ptr + every * (HEAD_SIZE + 1), mask=inside, other=0.0) / n
    mean = tl.load(total_ptr + every, mask=inside, other=0.0) / n
    shift = tl.load(shift_ptr + at * HEAD_SIZE + every, mask=inside, other=0.0)
    trace = tl.sum(moment - mean * mean, 0)
    # 64 float64 epsilons of the trace about zero: the rule of `naive.py`, a spread that float32
    # values around this mean cannot express.
    noise = tl.sum(moment + 2 * shift * mean + shift * shift, 0) * 1.4210854715202004e-14

    lines = row * TILE + tl.arange(0, TILE)
    columns = col * TILE + tl.arange(0, TILE)
    mask = (lines < HEAD_SIZE)[:, None] & (columns < HEAD_SIZE)[None, :]
    place = lines[:, None] * HEAD_SIZE + columns[None, :]
    mirror = columns[None, :] * HEAD_SIZE + lines[:, None]
    value = tl.load(outer_ptr + place, mask=mask, other=0.0)
    value = (value + tl.load(outer_ptr + mirror, mask=mask, other=0.0)) / (2 * n)
    left = tl.load(total_ptr + lines, mask=lines < HEAD_SIZE, other=0.0) / n
    right = tl.load(total_ptr + columns, mask=columns < HEAD_SIZE, other=0.0) / n
    value -= left[:, None] * right[None, :]
    # "not above" and not "at most": a NaN among the keys must reach the result.
    none = trace <= noise
    value = tl.where(none, 0.0, value / tl.where(none, 1.0, trace))
    tl.store(covariance_ptr + at * HEAD_SIZE * HEAD_SIZE + place, value, mask=mask)
