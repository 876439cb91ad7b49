"""What is compiled in the absence of a GPU (`uncomp.kernels.compile`)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from uncomp.kernels.variant import Config, Variant

from .kernel import combine_kernel, partial_kernel, scores_kernel
from .launch import COMBINE_CONFIGS, CONFIGS, pick, tiles

_TABLES = dict.fromkeys(
    ("lengths_ptr", "slots_ptr", "counts_ptr", "offsets_ptr", "spans_ptr"), "*i32"
)
_INTEGERS = ("num_rows", "num_slots", "window", "first_layer", "stride_row")
_STRIDES = ("stride_layer", "stride_request", "stride_token", "stride_head")
_NO_FP8 = {
    "sm_80": "no float8e4nv in Triton for this GPU",
    "gfx942": "this GPU's e4m3 is another format (float8e4b8)",
}


def _passes(
    size: int,
    dtype: Any,
    config: Config | None = None,
    group: int = 4,
    window: int = 8,
    maximum: bool = False,
    over_max: bool = False,
    capped: bool = False,
    shared: bool = False,
) -> list[Variant]:
    """Both passes. Queries of FP8 caches are bf16; the cache is in HND order."""
    dot_type = tl.bfloat16 if dtype == tl.float8e4nv else dtype
    queries = {tl.bfloat16: "*bf16", tl.float16: "*fp16"}[dot_type]
    signature = {**dict.fromkeys(("pointers_ptr", "layers_ptr"), "*i64"), "scales_ptr": "*fp32"}
    signature |= {"blocks_ptr": "*i32", **_TABLES}
    signature |= {"queries_ptr": queries, "scale_ptr": "*fp32", "softcap_ptr": "*fp32"}
    signature |= dict.fromkeys((*_INTEGERS, *_STRIDES), "i32")
    window_tile, rows, row_tiles = tiles(group, window)
    constants = {
        "CACHE_TYPE": dtype, "ITEM": 1 if dtype == tl.float8e4nv else 2, "SHARED": shared,
        "DOT_TYPE": dot_type, "STRIDE_BLOCK": 8 * 16 * 2 * size,
        "STRIDE_HEAD": 16 * 2 * size, "STRIDE_TOKEN": 2 * size, "HEADS": 8, "GROUP": group,
        "HEAD_SIZE": size, "SIZE_TILE": triton.next_power_of_2(size), "BLOCK_SIZE": 16,
        "WINDOW_TILE": window_tile, "CAPPED": capped, "ROWS": rows,
    }  # fmt: skip
    scores = {**signature, "normal_ptr": "*fp32", "out_ptr": "*fp32", "entries": "i32"}
    flags = {" over max": over_max, " max": maximum, " cap": capped, " shared": shared}
    name = f"{dtype} d={size} G={group} w={window}" + "".join(k for k, on in flags.items() if on)
    default = config is None
    config = config or pick(size, 2, row_tiles)
    skip = _NO_FP8 if dtype == tl.float8e4nv else {}
    return [
        Variant(
            f"window_scores 1 {name}", partial_kernel, {**signature, "partial_ptr": "*fp32"},
            constants, config, default, skip,
        ),
        Variant(
            f"window_scores 2 {name}", scores_kernel, scores,
            {**constants, "MAXIMUM": maximum, "OVER_MAX": over_max}, config, default, skip,
        ),
    ]  # fmt: skip


_combine = Variant(
    "window_scores combine",
    combine_kernel,
    {
        "partial_ptr": "*fp32", "normal_ptr": "*fp32", **_TABLES,
        **dict.fromkeys(("num_rows", "num_slots", "chunks", "numbers"), "i32"),
    },
    {"HEADS": 8, "BLOCK_SIZE": 16, "CHUNK": 1024},
    COMBINE_CONFIGS[0],
)  # fmt: skip

VARIANTS: list[Variant] = [
    *_passes(64, tl.float16),
    *_passes(128, tl.bfloat16),
    *_passes(256, tl.bfloat16, capped=True),
    *_passes(128, tl.float8e4nv),
    *_passes(128, tl.bfloat16, window=32, over_max=True, shared=True),
    *_passes(128, tl.bfloat16, window=64, maximum=True),
    *_passes(128, tl.bfloat16, window=32, over_max=True),
    *_passes(64, tl.float16, group=7, window=32, over_max=True),
    *_passes(256, tl.bfloat16, window=32, over_max=True),
    *(variant for config in CONFIGS[2:] for variant in _passes(128, tl.bfloat16, config)),
    _combine,
]
