"""What `uncomp.kernels.compile` compiles."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from uncomp.kernels.variant import Config, Variant

from .kernel import attend_kernel, merge_kernel, plan_programs_kernel, plan_tasks_kernel
from .launch import CONFIGS, MERGE_CONFIG, PLAN_CONFIG, PROGRAMS_CONFIG, padded_rows, pick

_NO_FP8 = {
    "sm_80": "no float8e4nv in Triton for this GPU",
    "gfx942": "this GPU's e4m3 is another format (float8e4b8)",
}
#: two tiles of K and V in flight do not fit its 64 KB
_TOO_LARGE = {"gfx942": "needs 96 KB of shared memory"}
_TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp8e4nv": tl.float8e4nv}
_SHARED = {"MOST": 256 * 8, "PROGRAMS": 528, "HEADS": 8}
_PLAN = dict.fromkeys(("starts_ptr", "tasks_ptr", "bounds_ptr"), "*i32")
_PARTS = {"acc_ptr": "*fp32", "state_ptr": "*fp32"}


def _attend(
    dtype: str,
    cache: str,
    size: int,
    group: int,
    tokens: int,
    config: Config | None = None,
    shared: bool = False,
) -> Variant:
    strides = ("query_stride_token", "query_stride_head", "out_stride_token", "out_stride_head")
    signature = {
        "query_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "pointers_ptr": "*i64",
        "scales_ptr": "*fp32", "blocks_ptr": "*i32", "sinks_ptr": "*fp32", **_PLAN, **_PARTS,
        "layer": "i32", "stride_row": "i32", **dict.fromkeys(strides, "i32"),
        "scale": "fp32", "softcap": "fp32",
    }  # fmt: skip
    constants: dict[str, Any] = {
        **_SHARED, "CACHE_TYPE": _TYPES[cache], "DOT_TYPE": _TYPES[dtype],
        "ITEM": 1 if cache == "fp8e4nv" else 2, "SHARED": shared,
        "STRIDE_BLOCK": 16 * 8 * 2 * size,
        "STRIDE_HEAD": 16 * 2 * size, "STRIDE_TOKEN": 2 * size, "QUERY_TOKENS": tokens,
        "GROUP": group, "HEAD_SIZE": size, "BLOCK_SIZE": 16, "CHUNK": 64,
        "HAS_SOFTCAP": tokens > 1, "HAS_SINKS": tokens > 1,
        "PADDED_ROWS": padded_rows(tokens * group, size),
        "PADDED_SIZE": triton.next_power_of_2(size),
    }  # fmt: skip
    return Variant(
        f"decode {dtype} {cache} d={size} G={group} q={tokens}" + " shared" * shared,
        attend_kernel,
        signature,
        constants,
        config or pick(tokens * group, size),
        config is None,
        _TOO_LARGE if config == CONFIGS[7] else _NO_FP8 if cache == "fp8e4nv" else {},
    )


def _merge(dtype: str, size: int) -> Variant:
    tables = {**_PLAN, "totals_ptr": "*i32", **_PARTS}
    signature = {
        "out_ptr": f"*{dtype}", "scales_ptr": "*fp32", "sinks_ptr": "*fp32", **tables,
        "layer": "i32", "out_stride_token": "i32", "out_stride_head": "i32",
    }  # fmt: skip
    constants = {
        **_SHARED, "QUERY_TOKENS": 4, "GROUP": 4, "HEAD_SIZE": size, "HAS_SINKS": True,
        "PADDED_SIZE": triton.next_power_of_2(size),
    }  # fmt: skip
    return Variant(f"decode_merge {dtype} d={size}", merge_kernel, signature, constants,
                   MERGE_CONFIG)  # fmt: skip


_TABLES = ("query_start_ptr", "lengths_ptr", "slots_ptr", "counts_ptr", "offsets_ptr", "spans_ptr")

VARIANTS: list[Variant] = [
    _attend("bf16", "bf16", 128, 4, 1),
    _attend("fp16", "fp16", 128, 4, 1),
    _attend("bf16", "bf16", 64, 8, 1),
    _attend("bf16", "bf16", 128, 4, 1, shared=True),
    _attend("bf16", "fp8e4nv", 128, 4, 1, shared=True),
    _attend("bf16", "bf16", 256, 2, 8),
    _attend("bf16", "bf16", 128, 4, 8),
    _attend("bf16", "bf16", 128, 16, 8),
    _attend("bf16", "fp8e4nv", 128, 4, 1),
    _attend("bf16", "fp8e4nv", 256, 2, 1),
    *(_attend("bf16", "bf16", 128, 4, 1, config) for config in CONFIGS[1:]),
    Variant(
        "decode_plan tasks",
        plan_tasks_kernel,
        {
            **dict.fromkeys((*_TABLES, "starts_ptr", "tasks_ptr", "totals_ptr"), "*i32"),
            "num_rows": "i32", "num_slots": "i32",
        },
        {"MOST": 256 * 8, "QUERY_TOKENS": 1, "HEADS": 8, "BLOCK_SIZE": 16, "CHUNK": 64},
        PLAN_CONFIG,
    ),
    Variant(
        "decode_plan programs",
        plan_programs_kernel,
        dict.fromkeys(("starts_ptr", "totals_ptr", "bounds_ptr"), "*i32"),
        {"MOST": 256 * 8, "PROGRAMS": 528, "STEPS": 12},
        PROGRAMS_CONFIG,
    ),
    _merge("bf16", 256),
]  # fmt: skip
