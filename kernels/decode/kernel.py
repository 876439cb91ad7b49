"""Device side of `launch.py`: plan of a step, attention of a layer, merging of split heads.

A *task* is one KV head of one row with query tokens; a *unit* is CHUNK entries of a task. All units
of a layer, task after task, are one line, cut into equal intervals: one a program. So a program
touches whole tasks, and at most one task that began in an earlier program (its partial result goes
to slot 2p) and one that goes on in a later one (slot 2p + 1).
"""

import triton
import triton.language as tl

from uncomp.kernels.paged.kernel import cache_offset, head_length, head_state

#: numbers in a task's record: task, entries, count, offset, first, full, first token, tokens
RECORD = tl.constexpr(8)


@triton.jit(
    do_not_specialize=["num_rows", "num_slots"],
    do_not_specialize_on_alignment=["query_start_ptr", "lengths_ptr", "slots_ptr"],
)
def plan_tasks_kernel(
    query_start_ptr,  # [R + 1] int32
    lengths_ptr,  # [R] int32
    slots_ptr,  # [R] int32
    counts_ptr,  # [L, S, H] int32
    offsets_ptr,  # [L, S, H] int32
    spans_ptr,  # [S, 2] int32
    starts_ptr,  # [L, MOST + 1] int32, first unit of every task, then the number of units
    tasks_ptr,  # [L, MOST, RECORD] int32
    totals_ptr,  # [L, 2] int32, tasks and units
    num_rows,
    num_slots,
    MOST: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (L,). Lists the tasks of a layer in order of (row, head), without gaps."""
    layer = tl.program_id(0)
    starts = starts_ptr + layer.to(tl.int64) * (MOST + 1)
    tasks = tasks_ptr + layer.to(tl.int64) * MOST * RECORD
    most = num_rows * HEADS
    num = layer * 0
    units = layer * 0
    for base in range(0, most, TILE):
        task = base + tl.arange(0, TILE)
        inside = task < most
        row = task // HEADS
        head = task % HEADS
        token = tl.load(query_start_ptr + row, mask=inside, other=0)
        tokens = tl.load(query_start_ptr + row + 1, mask=inside, other=0) - token
        active = (tokens > 0) & (tokens <= QUERY_TOKENS)
        length = tl.load(lengths_ptr + row, mask=active, other=0)
        slot = tl.load(slots_ptr + row, mask=active, other=-1)
        count, offset, first, full = head_state(
            counts_ptr, offsets_ptr, spans_ptr, layer.to(tl.int64), slot, head, num_slots, HEADS
        )
        held = head_length(length, count, full, BLOCK_SIZE)
        # A head that holds nothing has a unit too: somebody must write its output.
        chunks = tl.where(active, tl.maximum((held + CHUNK - 1) // CHUNK, 1), 0)
        one = active.to(tl.int32)
        at = num + tl.cumsum(one, axis=0) - one
        tl.store(starts + at, units + tl.cumsum(chunks, axis=0) - chunks, mask=active)
        record = tasks + at.to(tl.int64) * RECORD
        tl.store(record, task, mask=active)
        tl.store(record + 1, held, mask=active)
        tl.store(record + 2, count, mask=active)
        tl.store(record + 3, offset, mask=active)
        tl.store(record + 4, first, mask=active)
        tl.store(record + 5, full, mask=active)
        tl.store(record + 6, token, mask=active)
        tl.store(record + 7, tokens, mask=active)
        num += tl.sum(one, axis=0)
        units += tl.sum(chunks, axis=0)
    tl.store(starts + num, units)
    tl.store(totals_ptr + layer * 2, num)
    tl.store(totals_ptr + layer * 2 + 1, units)


@triton.jit
def plan_programs_kernel(
    starts_ptr,
    totals_ptr,
    bounds_ptr,  # [L, PROGRAMS + 1, 2] int32: first unit of a program, and the task it is in
    MOST: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (L, (PROGRAMS + 1) / TILE). STEPS: binary digits of MOST."""
    layer = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = program <= PROGRAMS
    num = tl.load(totals_ptr + layer * 2)
    units = tl.load(totals_ptr + layer * 2 + 1)
    busy = tl.maximum(tl.minimum(units, PROGRAMS), 1)
    unit = (program.to(tl.int64) * units // busy).to(tl.int32)
    unit = tl.minimum(unit, units)
    low = tl.zeros_like(program)
    high = low + num
    starts = starts_ptr + layer * (MOST + 1)
    for _ in range(STEPS):  # the last task that starts at or before the unit
        middle = (low + high + 1) // 2
        before = tl.load(starts + middle, mask=inside, other=0) <= unit
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    bound = bounds_ptr + (layer * (PROGRAMS + 1) + program) * 2
    tl.store(bound, unit, mask=inside)
    tl.store(bound + 1, low, mask=inside)


@triton.jit
def _finish(top, total, acc, sink, value_scale, HAS_SINKS: tl.constexpr):
    """Softmax-weighted sum from maximum [M], sum [M] and weighted sum [M, D]; sink [M], base 2."""
    if HAS_SINKS:
        highest = tl.maximum(top, sink)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        factor = tl.exp2(top - highest)
        total = total * factor + tl.exp2(sink - highest)
        acc = acc * factor[:, None]
    # nothing seen and no sink: 0, not 0 / 0
    return acc * (value_scale / tl.where(total > 0.0, total, 1.0))[:, None]


@triton.jit(
    do_not_specialize=["layer", "stride_row"], do_not_specialize_on_alignment=["blocks_ptr"]
)
def attend_kernel(
    query_ptr,  # [T, H * GROUP, d]
    out_ptr,  # [T, H * GROUP, d]
    pointers_ptr,  # [L] int64; L are all layers
    scales_ptr,  # [L, 2] float32
    blocks_ptr,  # [R, W] int32
    sinks_ptr,  # [H * GROUP] float32, or not read
    starts_ptr,
    tasks_ptr,
    bounds_ptr,
    acc_ptr,  # [2 * PROGRAMS, QUERY_TOKENS * GROUP, d] float32
    state_ptr,  # [2 * PROGRAMS, QUERY_TOKENS * GROUP, 2] float32: maximum (base 2), sum
    layer,
    stride_row,
    query_stride_token,
    query_stride_head,
    out_stride_token,
    out_stride_head,
    scale,
    softcap,
    CACHE_TYPE: tl.constexpr,
    ITEM: tl.constexpr,
    SHARED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    STRIDE_BLOCK: tl.constexpr,
    STRIDE_HEAD: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr,
    MOST: tl.constexpr,
    PROGRAMS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (PROGRAMS, lines / PADDED_ROWS). CHUNK is a multiple of BLOCK_N.

    ITEM: bytes of an element of the caches. SHARED: entries can lie in other layers' caches.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    program = tl.program_id(0)
    layer = layer.to(tl.int64)
    bound = bounds_ptr + (layer * (PROGRAMS + 1) + program) * 2
    begin = tl.load(bound)
    index = tl.load(bound + 1)
    end = tl.load(bound + 2)
    unit = begin
    starts = starts_ptr + layer * (MOST + 1)
    tasks = tasks_ptr + layer * MOST * RECORD
    own = tl.load(pointers_ptr + layer)
    cache = tl.multiple_of(own.to(tl.pointer_type(CACHE_TYPE)), 16)
    logit_scale = scale * tl.load(scales_ptr + layer * 2)
    value_scale = tl.load(scales_ptr + layer * 2 + 1)

    # of a task: token * GROUP + query head of the group
    line = tl.program_id(1) * PADDED_ROWS + tl.arange(0, PADDED_ROWS)
    which = line // GROUP
    dim = tl.arange(0, PADDED_SIZE)
    real = (dim < HEAD_SIZE)[None, :]

    while unit < end:
        record = tasks + index.to(tl.int64) * RECORD
        task = tl.load(record)
        held = tl.load(record + 1)
        count = tl.load(record + 2)
        offset = tl.load(record + 3)
        first = tl.load(record + 4)
        full = tl.load(record + 5)
        token = tl.load(record + 6)
        tokens = tl.load(record + 7)
        start = tl.load(starts + index)
        stop = tl.load(starts + index + 1)
        head = task % HEADS
        blocks = blocks_ptr + (task // HEADS).to(tl.int64) * stride_row

        used = which < tokens
        at = (token + which).to(tl.int64)
        query_head = head * GROUP + line % GROUP
        mask = used[:, None] & real
        query = tl.load(
            query_ptr
            + (at * query_stride_token + query_head * query_stride_head)[:, None]
            + dim[None, :],
            mask=mask,
            other=0.0,
        ).to(DOT_TYPE)
        seen = held - (tokens - 1 - which)  # causality: entries that a line sees
        top = tl.full((PADDED_ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((PADDED_ROWS,), tl.float32)
        acc = tl.zeros((PADDED_ROWS, PADDED_SIZE), tl.float32)
        until = tl.minimum(end, stop)
        limit = tl.minimum((until - start) * CHUNK, held)
        for base in range((unit - start) * CHUNK, limit, BLOCK_N):
            entry = base + tl.arange(0, BLOCK_N)
            valid = entry < limit
            place = cache_offset(
                pointers_ptr,
                own,
                layer,
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
                ITEM,
                SHARED,
            )
            source = cache + place[:, None] + dim[None, :]
            stored = valid[:, None] & real
            key = tl.load(source, mask=stored, other=0.0).to(DOT_TYPE)
            logits = tl.dot(query, tl.trans(key), input_precision="ieee") * logit_scale
            if HAS_SOFTCAP:  # tanh x = 1 - 2 / (e^2x + 1)
                bent = tl.exp2(logits * (2.0 * LOG2_E / softcap))
                logits = softcap - 2.0 * softcap / (bent + 1.0)
            logits = tl.where(entry[None, :] < seen[:, None], logits * LOG2_E, float("-inf"))
            higher = tl.maximum(top, tl.max(logits, axis=1))
            # a line that has seen nothing yet: -inf - -inf is NaN
            pivot = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp2(logits - pivot[:, None])
            decay = tl.exp2(top - pivot)
            total = total * decay + tl.sum(weight, axis=1)
            value = tl.load(source + HEAD_SIZE, mask=stored, other=0.0).to(DOT_TYPE)
            acc = acc * decay[:, None]
            acc = tl.dot(weight.to(DOT_TYPE), value, acc, input_precision="ieee")
            top = higher

        if (start >= begin) & (stop <= end):
            sink = top
            if HAS_SINKS:
                sink = tl.load(sinks_ptr + query_head, mask=used, other=0.0) * LOG2_E
            result = _finish(top, total, acc, sink, value_scale, HAS_SINKS)
            goal = at * out_stride_token + query_head * out_stride_head
            goal = out_ptr + goal[:, None] + dim[None, :]
            tl.store(goal, result.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            slot = 2 * program + (start >= begin).to(tl.int32)
            part = slot.to(tl.int64) * (QUERY_TOKENS * GROUP) + line
            tl.store(acc_ptr + part[:, None] * HEAD_SIZE + dim[None, :], acc, mask=mask)
            tl.store(state_ptr + part * 2, top, mask=used)
            tl.store(state_ptr + part * 2 + 1, total, mask=used)
        unit = until
        index += 1


@triton.jit(do_not_specialize=["layer"])
def merge_kernel(
    out_ptr,
    scales_ptr,
    sinks_ptr,
    starts_ptr,
    tasks_ptr,
    totals_ptr,
    bounds_ptr,
    acc_ptr,
    state_ptr,
    layer,
    out_stride_token,
    out_stride_head,
    MOST: tl.constexpr,
    PROGRAMS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Grid (PROGRAMS, GROUP). Program p merges the task that begins in p and goes on after it."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    program = tl.program_id(0)
    member = tl.program_id(1)
    layer = layer.to(tl.int64)
    bound = bounds_ptr + (layer * (PROGRAMS + 1) + program) * 2
    starts = starts_ptr + layer * (MOST + 1)
    begin = tl.load(bound)
    end = tl.load(bound + 2)
    index = tl.load(bound + 3)
    start = tl.load(starts + index)
    if (start < begin) | (start >= end):
        return
    stop = tl.load(starts + index + 1)
    units = tl.load(totals_ptr + layer * 2 + 1)
    # inverse of the cut in plan_programs_kernel: the program that has unit stop - 1
    busy = tl.minimum(units, PROGRAMS).to(tl.int64)
    last = ((stop * busy - 1) // units).to(tl.int32)
    record = tasks_ptr + (layer * MOST + index) * RECORD
    query_head = (tl.load(record) % HEADS) * GROUP + member
    token = tl.load(record + 6)
    tokens = tl.load(record + 7)
    value_scale = tl.load(scales_ptr + layer * 2 + 1)

    dim = tl.arange(0, PADDED_SIZE)
    real = dim < HEAD_SIZE
    one = tl.arange(0, 1)
    sink = tl.full((1,), float("-inf"), tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + query_head + one) * LOG2_E
    for which in range(0, tokens):
        top = tl.full((1,), float("-inf"), tl.float32)
        total = tl.zeros((1,), tl.float32)
        acc = tl.zeros((1, PADDED_SIZE), tl.float32)
        for base in range(program, last + 1, PIECES):
            piece = base + tl.arange(0, PIECES)
            there = piece <= last
            slot = 2 * piece + (piece == program).to(tl.int32)
            part = slot.to(tl.int64) * (QUERY_TOKENS * GROUP) + which * GROUP + member
            tops = tl.load(state_ptr + part * 2, mask=there, other=float("-inf"))
            totals = tl.load(state_ptr + part * 2 + 1, mask=there, other=0.0)
            sums = tl.load(
                acc_ptr + part[:, None] * HEAD_SIZE + dim[None, :],
                mask=there[:, None] & real[None, :],
                other=0.0,
            )
            higher = tl.maximum(top, tl.max(tops, axis=0))
            pivot = tl.where(higher == float("-inf"), 0.0, higher)
            decay = tl.exp2(top - pivot)
            weight = tl.exp2(tops - pivot)
            total = total * decay + tl.sum(totals * weight, axis=0)
            acc = acc * decay[:, None] + tl.sum(sums * weight[:, None], axis=0)[None, :]
            top = higher
        result = _finish(top, total, acc, sink, value_scale, HAS_SINKS)
        goal = (token + which + one).to(tl.int64) * out_stride_token + query_head * out_stride_head
        goal = out_ptr + goal[:, None] + dim[None, :]
        tl.store(goal, result.to(out_ptr.dtype.element_ty), mask=real[None, :])
