"""What is compiled in the absence of a GPU (`uncomp.kernels.compile`)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from uncomp.kernels.variant import Config, Variant

from .kernel import covariance_kernel, gram_paged_kernel, gram_rows_kernel
from .launch import CONFIGS, COVARIANCE_CONFIGS, SAMPLE

_TABLES = dict.fromkeys(
    ("blocks_ptr", "lengths_ptr", "slots_ptr", "counts_ptr", "offsets_ptr", "spans_ptr"), "*i32"
)
_OUT = {"shift_ptr": "*fp32", "outer_ptr": "*fp32", "total_ptr": "*fp32", "count_ptr": "*i32"}
_NO_FP8 = {
    "sm_80": "no float8e4nv in Triton for this GPU",
    "gfx942": "this GPU's e4m3 is another format (float8e4b8)",
}


def _paged(size: int, dtype: Any, config: Config, default: bool, shared: bool = False) -> Variant:
    strides = (
        "num_slots",
        "first_layer",
        "stride_row",
        "stride_block",
        "stride_head",
        "stride_token",
    )
    signature = {**dict.fromkeys(("pointers_ptr", "layers_ptr"), "*i64"), "scales_ptr": "*fp32"}
    signature |= {**_TABLES, "stride_ptr": "*i32"}
    constants = {
        "CACHE_TYPE": dtype, "ITEM": 1 if dtype == tl.float8e4nv else 2, "SHARED": shared,
        "DOT_TYPE": tl.bfloat16, "HEADS": 8, "HEAD_SIZE": size, "BLOCK_SIZE": 16, "SAMPLE": SAMPLE,
    }  # fmt: skip
    return Variant(
        f"gram_paged {dtype} d={size}" + " shared" * shared,
        gram_paged_kernel,
        {**signature, **_OUT, **dict.fromkeys(strides, "i32")},
        constants,
        config,
        default,
        _NO_FP8 if dtype == tl.float8e4nv else {},
    )


def _rows(size: int, dtype: str) -> Variant:
    tables = dict.fromkeys(("starts_ptr", "seen_ptr", "stride_ptr"), "*i32")
    strides = {"stride_token": "i32", "stride_head": "i32"}
    return Variant(
        f"gram_rows {dtype} d={size}",
        gram_rows_kernel,
        {"x_ptr": f"*{dtype}", **tables, **_OUT, **strides},
        {"DOT_TYPE": tl.bfloat16, "HEADS": 32, "HEAD_SIZE": size, "SAMPLE": SAMPLE},
        CONFIGS[0],
    )


def _covariance(size: int) -> Variant:
    return Variant(
        f"covariance d={size}",
        covariance_kernel,
        {**_OUT, "covariance_ptr": "*fp32"},
        {"HEAD_SIZE": size, "PADDED": triton.next_power_of_2(size)},
        COVARIANCE_CONFIGS[0],
    )


VARIANTS: list[Variant] = [
    *(_paged(size, tl.bfloat16, CONFIGS[0], True) for size in (64, 96, 128, 256)),
    _paged(128, tl.float16, CONFIGS[0], True),
    _paged(128, tl.bfloat16, CONFIGS[0], True, shared=True),
    _paged(128, tl.float8e4nv, CONFIGS[0], True),
    *(_paged(128, tl.bfloat16, config, False) for config in CONFIGS[1:]),
    *(_rows(size, "bf16") for size in (64, 128)),
    *(_covariance(size) for size in (128, 256)),
]
