"""Device side of the window scores over the paged cache; see `launch.py` for shapes.

Rows of a tile are queries: query i of the window of query head g is row g * WINDOW_TILE + i, where
WINDOW_TILE is the window rounded up to a power of two, so that a tile holds whole query heads or a
query head fills whole tiles. Logits are in base 2.
"""

import triton
import triton.language as tl

from uncomp.kernels.paged.kernel import cache_offset, head_of_program

#: instead of -inf as the first maximum: inf - inf would be NaN
NOTHING = tl.constexpr(-1.0e30)
LOG2_E = tl.constexpr(1.4426950408889634)
#: integers that differ from launch to launch and must not cause another compilation
VARYING = ["num_rows", "num_slots", "window", "first_layer"]


@triton.jit
def query_tile(
    queries_ptr, tile, window, stride_token, stride_head,
    GROUP: tl.constexpr, WINDOW_TILE: tl.constexpr, ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr, SIZE_TILE: tl.constexpr, DOT_TYPE: tl.constexpr,
):  # fmt: skip
    """Queries `[ROWS, SIZE_TILE]` of one KV head, their place in the window, number g * w + i and
    whether they exist. `queries_ptr`: first query of the first of the GROUP heads."""
    at = tile * ROWS + tl.arange(0, ROWS)
    member = at // WINDOW_TILE
    step = at % WINDOW_TILE
    real = (member < GROUP) & (step < window)
    dims = tl.arange(0, SIZE_TILE)
    places = queries_ptr + (step * stride_token + member * stride_head)[:, None] + dims[None, :]
    mask = real[:, None] & (dims < HEAD_SIZE)[None, :]
    queries = tl.load(places, mask=mask, other=0.0).to(DOT_TYPE)
    return queries, step, member * window + step, real


@triton.jit
def key_tile(
    layers_ptr, own, layer, row_ptr, entry, n, count, offset, first, full, head,
    CACHE_TYPE: tl.constexpr, ITEM: tl.constexpr, SHARED: tl.constexpr,
    STRIDE_BLOCK: tl.constexpr, STRIDE_HEAD: tl.constexpr, STRIDE_TOKEN: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr,
    SIZE_TILE: tl.constexpr, DOT_TYPE: tl.constexpr,
):  # fmt: skip
    """Keys `[BLOCK_N, SIZE_TILE]` of these entries, 0 beyond the head's.

    `own`: address of the layer's cache. `layers_ptr`: those of all, of which it is number `layer`.
    """
    inside = entry < n
    at = cache_offset(
        layers_ptr, own, layer, row_ptr, entry, inside, count, offset, first, full, head,
        STRIDE_BLOCK, STRIDE_HEAD, STRIDE_TOKEN, HEADS, BLOCK_SIZE, ITEM, SHARED,
    )  # fmt: skip
    cache = tl.multiple_of(own.to(tl.pointer_type(CACHE_TYPE)), 16)  # checked by the launcher
    dims = tl.arange(0, SIZE_TILE)
    mask = inside[:, None] & (dims < HEAD_SIZE)[None, :]
    return tl.load(cache + at[:, None] + dims[None, :], mask=mask, other=0.0).to(DOT_TYPE)


@triton.jit
def logit_tile(queries, keys, step, entry, n, window, factor, cap, CAPPED: tl.constexpr):
    """Base-2 logits `[ROWS, BLOCK_N]`, -inf where the query does not see the entry."""
    x = tl.dot(queries, tl.trans(keys), input_precision="ieee") * factor
    if CAPPED:
        safe = tl.where(cap > 0, cap, 1.0)
        # tanh by exp: there is no tanh that is both interpreted and compiled for every target.
        bent = cap * (1.0 - 2.0 / (tl.exp(2.0 * x / safe) + 1.0))
        x = tl.where(cap > 0, bent, x)
    visible = entry[None, :] <= (n - window + step)[:, None]
    return tl.where(visible, x * LOG2_E, float("-inf"))


@triton.jit(do_not_specialize=VARYING)
def partial_kernel(
    pointers_ptr, layers_ptr, scales_ptr, blocks_ptr, lengths_ptr, slots_ptr, counts_ptr,
    offsets_ptr, spans_ptr, queries_ptr, scale_ptr, softcap_ptr, partial_ptr,
    num_rows, num_slots, window, first_layer, stride_row,
    stride_layer, stride_request, stride_token, stride_head,
    CACHE_TYPE: tl.constexpr, ITEM: tl.constexpr, SHARED: tl.constexpr,
    DOT_TYPE: tl.constexpr, STRIDE_BLOCK: tl.constexpr,
    STRIDE_HEAD: tl.constexpr, STRIDE_TOKEN: tl.constexpr, HEADS: tl.constexpr,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, SIZE_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW_TILE: tl.constexpr, CAPPED: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Pass 1: maximum and sum of exponentials of a chunk. Grid (L R H, chunks, tiles of rows).

    Writes `partial[lrh, chunk, 0 or 1, g * w + i]`; chunks beyond a head are not written.
    """
    layer, row, head, count, offset, first, full, _length, n = head_of_program(
        lengths_ptr, slots_ptr, counts_ptr, offsets_ptr, spans_ptr, num_rows, num_slots,
        HEADS, BLOCK_SIZE,
    )  # fmt: skip
    begin = tl.program_id(1) * CHUNK
    if begin >= n:
        return
    end = tl.minimum(begin + CHUNK, n)
    own = tl.load(pointers_ptr + layer)
    row_ptr = blocks_ptr + row.to(tl.int64) * stride_row
    queries_ptr += layer.to(tl.int64) * stride_layer + row.to(tl.int64) * stride_request
    queries, step, number, real = query_tile(
        queries_ptr + head * GROUP * stride_head, tl.program_id(2), window, stride_token,
        stride_head, GROUP, WINDOW_TILE, ROWS, HEAD_SIZE, SIZE_TILE, DOT_TYPE,
    )  # fmt: skip
    factor = tl.load(scale_ptr + layer) * tl.load(scales_ptr + layer * 2)
    cap = 0.0
    if CAPPED:
        cap = tl.load(softcap_ptr + layer)

    top = tl.full((ROWS,), NOTHING, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(begin, end, BLOCK_N):
        entry = start + tl.arange(0, BLOCK_N)
        keys = key_tile(
            layers_ptr, own, first_layer + layer, row_ptr, entry, n, count, offset, first, full,
            head, CACHE_TYPE, ITEM, SHARED, STRIDE_BLOCK, STRIDE_HEAD, STRIDE_TOKEN, HEADS,
            BLOCK_SIZE, HEAD_SIZE, SIZE_TILE, DOT_TYPE,
        )  # fmt: skip
        x = logit_tile(queries, keys, step, entry, n, window, factor, cap, CAPPED)
        higher = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(x - higher[:, None]), 1)
        top = higher

    place = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 2
    number += place * (GROUP * window)
    tl.store(partial_ptr + number, top, mask=real)
    tl.store(partial_ptr + number + GROUP * window, total, mask=real)


@triton.jit(do_not_specialize=["num_rows", "num_slots", "chunks", "numbers"])
def combine_kernel(
    partial_ptr, normal_ptr, lengths_ptr, slots_ptr, counts_ptr, offsets_ptr, spans_ptr,
    num_rows, num_slots, chunks, numbers,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of every query over all chunks of its head. Grid (L R H, tiles of columns).

    `numbers` = G * w. A query that sees nothing gets +inf: probability 0 in pass 2.
    """
    _layer, _row, _head, _count, _offset, _first, _full, _length, n = head_of_program(
        lengths_ptr, slots_ptr, counts_ptr, offsets_ptr, spans_ptr, num_rows, num_slots,
        HEADS, BLOCK_SIZE,
    )  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    partial_ptr += program * chunks * 2 * numbers
    used = tl.minimum(tl.cdiv(n, CHUNK), chunks)
    top = tl.full((COLUMNS,), NOTHING, tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, used, LINES):
        line = start + tl.arange(0, LINES)
        at = line[:, None] * 2 * numbers + column[None, :]
        mask = (line < used)[:, None] & (column < numbers)[None, :]
        tops = tl.load(partial_ptr + at, mask=mask, other=NOTHING)
        totals = tl.load(partial_ptr + at + numbers, mask=mask, other=0.0)
        higher = tl.maximum(top, tl.max(tops, 0))
        total = total * tl.exp2(top - higher) + tl.sum(totals * tl.exp2(tops - higher[None, :]), 0)
        top = higher
    normal = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
    tl.store(normal_ptr + program * numbers + column, normal, mask=column < numbers)


@triton.jit
def group_scores(
    p, WINDOW_TILE: tl.constexpr, MAXIMUM: tl.constexpr, OVER_MAX: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum or maximum, over the query heads in a tile, of the sum or maximum of the window."""
    heads = tl.reshape(p, (ROWS // WINDOW_TILE, WINDOW_TILE, BLOCK_N))
    each = tl.max(heads, 1) if OVER_MAX else tl.sum(heads, 1)
    return tl.max(each, 0) if MAXIMUM else tl.sum(each, 0)


@triton.jit(do_not_specialize=VARYING)
def scores_kernel(
    pointers_ptr, layers_ptr, scales_ptr, blocks_ptr, lengths_ptr, slots_ptr, counts_ptr,
    offsets_ptr, spans_ptr, queries_ptr, scale_ptr, softcap_ptr, normal_ptr, out_ptr,
    num_rows, num_slots, window, entries, first_layer, stride_row,
    stride_layer, stride_request, stride_token, stride_head,
    CACHE_TYPE: tl.constexpr, ITEM: tl.constexpr, SHARED: tl.constexpr,
    DOT_TYPE: tl.constexpr, STRIDE_BLOCK: tl.constexpr,
    STRIDE_HEAD: tl.constexpr, STRIDE_TOKEN: tl.constexpr, HEADS: tl.constexpr,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, SIZE_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW_TILE: tl.constexpr, CAPPED: tl.constexpr,
    MAXIMUM: tl.constexpr, OVER_MAX: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Pass 2: probabilities, reduced over the window and then over the group.

    Grid (L R H, chunks). Writes `out[lrh, entry]` below the head's entries.
    """
    TILES: tl.constexpr = (GROUP * WINDOW_TILE + ROWS - 1) // ROWS
    TILES_PER_HEAD: tl.constexpr = (WINDOW_TILE + ROWS - 1) // ROWS
    layer, row, head, count, offset, first, full, _length, n = head_of_program(
        lengths_ptr, slots_ptr, counts_ptr, offsets_ptr, spans_ptr, num_rows, num_slots,
        HEADS, BLOCK_SIZE,
    )  # fmt: skip
    begin = tl.program_id(1) * CHUNK
    if begin >= n:
        return
    end = tl.minimum(begin + CHUNK, n)
    own = tl.load(pointers_ptr + layer)
    row_ptr = blocks_ptr + row.to(tl.int64) * stride_row
    queries_ptr += layer.to(tl.int64) * stride_layer + row.to(tl.int64) * stride_request
    queries_ptr += head * GROUP * stride_head
    normal_ptr += tl.program_id(0).to(tl.int64) * GROUP * window
    out_ptr += tl.program_id(0).to(tl.int64) * entries
    factor = tl.load(scale_ptr + layer) * tl.load(scales_ptr + layer * 2)
    cap = 0.0
    if CAPPED:
        cap = tl.load(softcap_ptr + layer)
    if TILES == 1:  # the usual case: the queries stay in registers
        queries, step, number, real = query_tile(
            queries_ptr, 0, window, stride_token, stride_head,
            GROUP, WINDOW_TILE, ROWS, HEAD_SIZE, SIZE_TILE, DOT_TYPE,
        )  # fmt: skip
        normal = tl.load(normal_ptr + number, mask=real, other=float("inf"))

    for start in range(begin, end, BLOCK_N):
        entry = start + tl.arange(0, BLOCK_N)
        keys = key_tile(
            layers_ptr, own, first_layer + layer, row_ptr, entry, n, count, offset, first, full,
            head, CACHE_TYPE, ITEM, SHARED, STRIDE_BLOCK, STRIDE_HEAD, STRIDE_TOKEN, HEADS,
            BLOCK_SIZE, HEAD_SIZE, SIZE_TILE, DOT_TYPE,
        )  # fmt: skip
        if TILES == 1:
            x = logit_tile(queries, keys, step, entry, n, window, factor, cap, CAPPED)
            p = tl.exp2(x - normal[:, None])
            if MAXIMUM or OVER_MAX:
                score = group_scores(p, WINDOW_TILE, MAXIMUM, OVER_MAX, ROWS, BLOCK_N)
            else:
                score = tl.sum(p, 0)
        else:
            score = tl.zeros((BLOCK_N,), tl.float32)
            member_score = tl.zeros((BLOCK_N,), tl.float32)
            # Pipelined, the queries of several tiles would take the registers that the logits need.
            for tile in tl.range(TILES, num_stages=1):
                queries, step, number, real = query_tile(
                    queries_ptr, tile, window, stride_token, stride_head,
                    GROUP, WINDOW_TILE, ROWS, HEAD_SIZE, SIZE_TILE, DOT_TYPE,
                )  # fmt: skip
                normal = tl.load(normal_ptr + number, mask=real, other=float("inf"))
                x = logit_tile(queries, keys, step, entry, n, window, factor, cap, CAPPED)
                p = tl.exp2(x - normal[:, None])
                if not (MAXIMUM or OVER_MAX):
                    score += tl.sum(p, 0)
                elif TILES_PER_HEAD == 1:
                    part = group_scores(p, WINDOW_TILE, MAXIMUM, OVER_MAX, ROWS, BLOCK_N)
                    score = tl.maximum(score, part) if MAXIMUM else score + part
                else:
                    member_score = tl.where(tile % TILES_PER_HEAD == 0, 0.0, member_score)
                    if OVER_MAX:
                        member_score = tl.maximum(member_score, tl.max(p, 0))
                    else:
                        member_score += tl.sum(p, 0)
                    if MAXIMUM:
                        score = tl.maximum(score, member_score)  # grows until the head is complete
                    else:
                        is_last = tile % TILES_PER_HEAD == TILES_PER_HEAD - 1
                        score += tl.where(is_last, member_score, 0.0)
        tl.store(out_ptr + entry, score, mask=(entry < n) & (entry < entries))
