"""Triton side of `launch.py`."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["layer"])
def record_kernel(
    rows_ptr,  # [T, ROW] with a stride
    source_ptr,  # [n] int64 row numbers, or not read
    address_ptr,  # [n] int64
    count_ptr,  # [L] int64
    layer,
    stride_row,
    ROW: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0)
    if entry == 0:  # the only program that touches it: no atomic needed
        tl.store(count_ptr + layer, tl.load(count_ptr + layer) + 1)
    address = tl.load(address_ptr + entry)
    if address != 0:
        row = tl.load(source_ptr + entry) if HAS_SOURCE else entry.to(tl.int64)
        into = address.to(tl.pointer_type(rows_ptr.dtype.element_ty)) + layer.to(tl.int64) * ROW
        for start in tl.static_range(0, ROW, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(rows_ptr + row * stride_row + at, mask=at < ROW)
            tl.store(into + at, value, mask=at < ROW)
