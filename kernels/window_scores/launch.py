"""Launcher of the Triton kernels: window scores of several layers and requests at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uncomp.kernels.paged import Caches, Holdings, Rows
from uncomp.kernels.paged.types import CACHE_TYPES
from uncomp.kernels.variant import Config

from .kernel import combine_kernel, partial_kernel, scores_kernel
from .naive import Over, Reduce

#: CHUNK: entries of one program. The first two are defaults (see `pick`), the others are timed by
#: the GPU benchmark. Keys are reached through block ids, two dependent loads: up to 4 stages keep
#: one tile of keys in flight, 5 keep two.
CONFIGS = (
    Config({"CHUNK": 1024, "BLOCK_N": 64}, num_warps=4, num_stages=3),
    Config({"CHUNK": 1024, "BLOCK_N": 32}, num_warps=4, num_stages=3),
    Config({"CHUNK": 1024, "BLOCK_N": 128}, num_warps=8, num_stages=3),
    Config({"CHUNK": 1024, "BLOCK_N": 64}, num_warps=4, num_stages=5),
)
COMBINE_CONFIGS = (Config({"COLUMNS": 32, "LINES": 32}, num_warps=4, num_stages=1),)
#: most queries in a tile; the padded row counts of `tl.dot` begin at 16
ROWS = (16, 64)
HEAD_SIZES = (16, 256)

QUERY_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def pick(head_size: int, dot_bytes: int, row_tiles: int = 1) -> Config:
    """Tiling for a head size, the bytes of one element that is multiplied, and tiles of queries.

    Several tiles of 64 queries each want 64 x 64 logits and what they are reduced to in registers:
    with fewer entries a step nothing spills.
    """
    fits = triton.next_power_of_2(head_size) * dot_bytes <= 256 and row_tiles == 1
    return CONFIGS[0] if fits else CONFIGS[1]


def tiles(group: int, window: int) -> tuple[int, int, int]:
    """WINDOW_TILE, ROWS (see `kernel.py`) and the number of tiles of one KV head."""
    window_tile = triton.next_power_of_2(window)
    rows = min(max(triton.next_power_of_2(group * window_tile), ROWS[0]), ROWS[1])
    return window_tile, rows, triton.cdiv(group * window_tile, rows)


def workspace_size(
    layers: int, requests: int, query_heads: int, window: int, entries: int,
    config: Config | None = None,
) -> int:  # fmt: skip
    """Elements of the float32 workspace; any `config` of this CHUNK or a larger one fits."""
    chunk = min(c.meta["CHUNK"] for c in CONFIGS) if config is None else config.meta["CHUNK"]
    return layers * requests * query_heads * window * (2 * triton.cdiv(entries, chunk) + 1)


def window_scores_paged(
    caches: Caches,
    rows: Rows,
    holdings: Holdings,
    queries: Tensor,
    scale: Tensor,
    softcap: Tensor | None,
    reduce: Reduce,
    out: Tensor,
    workspace: Tensor | None = None,
    config: Config | None = None,
    over: Over = "sum",
) -> Tensor:
    """`naive.window_scores` of everything that these requests hold, three launches in all.

    The last w entries of a head are the last w tokens, so query i of w sees entry e of a head with
    n entries if e <= n - w + i. A head with n < w entries has its last n queries see something.

    Args:
        caches, rows, holdings: see `uncomp.kernels.paged`.
        queries: `[L, R, w, H * G, d]`, after RoPE, oldest first, last stride 1; query heads h * G
            to h * G + G - 1 belong to KV head h. dtype of the caches (FP8 caches: any float).
        scale: `[L]` float32 on the device, factor on the logits.
        softcap: `[L]` float32; logits become `softcap * tanh(logits / softcap)`, 0 switches it
            off. None: off in all layers.
        reduce: "sum" or "max" over the query heads of a KV head.
        out: `[L, R, H, N]` float32, N at least the entries of the longest head (a longer head is
            cut, and wrong). Entries of a head are written, nothing beyond them is.
        workspace: float32, at least `workspace_size(L, R, H * G, w, N, config)` elements; None
            allocates. Need not be cleared.
        config: tiling; None means `pick`.
        over: "sum" or "max" over the window of a query head.

    Returns:
        `out`.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit, or an unknown `reduce` or
            `over`.
    """
    _check_paged(caches, rows, holdings)
    _check(caches, rows, queries, scale, softcap, out)
    for what, value in (("reduce", reduce), ("over", over)):
        if value not in ("sum", "max"):
            raise ValueError(f"window_scores_paged: {what} must be 'sum' or 'max', got {value!r}")
    layers, requests, window, query_heads, size = queries.shape
    heads, entries, group = caches.heads, out.shape[3], query_heads // caches.heads
    if out.numel() == 0:
        return out
    window_tile, tile_rows, row_tiles = tiles(group, window)
    config = config or pick(size, queries.dtype.itemsize, row_tiles)
    chunk = config.meta["CHUNK"]
    chunks, numbers = triton.cdiv(entries, chunk), group * window
    programs = layers * requests * heads
    needed = workspace_size(layers, requests, query_heads, window, entries, config)
    partial, normal = _workspace(workspace, needed, programs * numbers, out.device)
    table = (rows.lengths, rows.slots, holdings.counts, holdings.offsets, holdings.spans)
    cached = (caches.pointers, caches.all.pointers, caches.scales, rows.blocks, *table)
    # Any address will do where there is no soft cap: the kernel does not read it.
    logits = (queries, scale, scale if softcap is None else softcap)
    constants = {
        "CACHE_TYPE": CACHE_TYPES[caches.dtype], "DOT_TYPE": _dot_type(queries.dtype),
        "ITEM": caches.dtype.itemsize, "SHARED": holdings.shared,
        "STRIDE_BLOCK": caches.strides[0], "STRIDE_HEAD": caches.strides[1],
        "STRIDE_TOKEN": caches.strides[2], "HEADS": heads, "GROUP": group, "HEAD_SIZE": size,
        "SIZE_TILE": triton.next_power_of_2(size), "BLOCK_SIZE": caches.block_size,
        "WINDOW_TILE": window_tile, "CAPPED": softcap is not None, "ROWS": tile_rows,
    }  # fmt: skip
    launch = {**config.meta, "num_warps": config.num_warps, "num_stages": config.num_stages}
    strides = (rows.blocks.stride(0), *queries.stride()[:4])
    partial_kernel[(programs, chunks, row_tiles)](
        *cached, *logits, partial, requests, holdings.slots, window, holdings.start, *strides,
        **constants, **launch,
    )  # fmt: skip
    combine = COMBINE_CONFIGS[0]
    combine_kernel[(programs, triton.cdiv(numbers, combine.meta["COLUMNS"]))](
        partial, normal, *table, requests, holdings.slots, chunks, numbers,
        HEADS=heads, BLOCK_SIZE=caches.block_size, CHUNK=chunk, **combine.meta,
        num_warps=combine.num_warps, num_stages=combine.num_stages,
    )  # fmt: skip
    scores_kernel[(programs, chunks)](
        *cached, *logits, normal, out, requests, holdings.slots, window, entries, holdings.start,
        *strides,
        **constants, MAXIMUM=reduce == "max", OVER_MAX=over == "max", **launch,
    )  # fmt: skip
    return out


def _dot_type(dtype: torch.dtype) -> tl.dtype:
    """The interpreter cannot multiply bf16; the same values as float32 it can."""
    compiled = isinstance(partial_kernel, triton.runtime.JITFunction)
    return QUERY_TYPES[dtype] if compiled else tl.float32


def _workspace(
    given: Tensor | None, needed: int, normals: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    if given is None:
        given = torch.empty(needed, device=device)
    fits = given.dtype == torch.float32 and given.is_contiguous() and given.device == device
    if not fits or given.numel() < needed:
        raise ValueError(
            f"window_scores_paged: workspace must be contiguous float32 with at least {needed} "
            f"elements on {device}, got {given.numel()} {given.dtype} on {given.device}"
        )
    flat = given.view(-1)
    return flat[: needed - normals], flat[needed - normals :]


def _check_paged(caches: Caches, rows: Rows, holdings: Holdings) -> None:
    name, device = "window_scores_paged", caches.device
    if caches.dtype not in CACHE_TYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in CACHE_TYPES)
        raise ValueError(f"{name}: caches of {caches.dtype}; allowed: {allowed}")
    if not HEAD_SIZES[0] <= caches.head_size <= HEAD_SIZES[1]:
        raise ValueError(
            f"{name}: head size must be in {HEAD_SIZES[0]}..{HEAD_SIZES[1]}, got {caches.head_size}"
        )
    if any(tensor.data_ptr() % 16 for tensor in caches.tensors):
        raise ValueError(f"{name}: caches must begin at multiples of 16 bytes")
    requests = rows.lengths.shape[0] if rows.lengths.dim() == 1 else -1
    table = (caches.layers, holdings.slots, caches.heads)
    for what, tensor, shape in (
        ("rows.lengths", rows.lengths, (requests,)),
        ("rows.slots", rows.slots, (requests,)),
        ("holdings.counts", holdings.counts, table),
        ("holdings.offsets", holdings.offsets, table),
        ("holdings.spans", holdings.spans, (holdings.slots, 2)),
    ):
        fits = tuple(tensor.shape) == shape and tensor.dtype == torch.int32
        if not fits or not tensor.is_contiguous() or tensor.device != device:
            raise ValueError(
                f"{name}: {what} must be contiguous int32 {list(shape)} on {device}, got "
                f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    blocks = rows.blocks
    if blocks.dim() != 2 or blocks.shape[0] != requests or blocks.dtype != torch.int32:
        raise ValueError(
            f"{name}: rows.blocks must be int32 [{requests}, W], got {list(blocks.shape)} "
            f"{blocks.dtype}"
        )


def _check(
    caches: Caches,
    rows: Rows,
    queries: Tensor,
    scale: Tensor,
    softcap: Tensor | None,
    out: Tensor,
) -> None:
    name = "window_scores_paged"
    layers, requests, heads = caches.layers, rows.lengths.shape[0], caches.heads
    fits = queries.dim() == 5 and queries.shape[:2] == (layers, requests)
    fits = fits and queries.shape[2] > 0 and queries.shape[4] == caches.head_size
    if not fits or queries.shape[3] == 0 or queries.shape[3] % heads or queries.stride(4) != 1:
        raise ValueError(
            f"{name}: queries must be [{layers}, {requests}, w, {heads} * G, {caches.head_size}] "
            f"with last stride 1, got {list(queries.shape)}"
        )
    if queries.dtype not in QUERY_TYPES or (
        caches.dtype in QUERY_TYPES and queries.dtype != caches.dtype
    ):
        raise ValueError(
            f"{name}: queries of {queries.dtype} do not go with caches of {caches.dtype}"
        )
    for what, factor in (("scale", scale), ("softcap", softcap)):
        if factor is not None and (
            tuple(factor.shape) != (layers,) or factor.dtype != torch.float32
        ):
            raise ValueError(
                f"{name}: {what} must be float32 [{layers}], got {list(factor.shape)} "
                f"{factor.dtype}"
            )
    if out.dim() != 4 or tuple(out.shape[:3]) != (layers, requests, heads):
        raise ValueError(
            f"{name}: out must be [{layers}, {requests}, {heads}, N], got {list(out.shape)}"
        )
    if out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"{name}: out must be contiguous float32, got {out.dtype}")
