"""Launchers: a plan per step, then attention and merging per layer, all of fixed size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from uncomp.kernels.paged import Caches, Holdings, Rows
from uncomp.kernels.paged.types import CACHE_TYPES
from uncomp.kernels.variant import Config

from .kernel import RECORD, attend_kernel, merge_kernel, plan_programs_kernel, plan_tasks_kernel

#: tilings of `attend_kernel`; `pick` chooses, the GPU benchmark times the others
CONFIGS = (
    Config({"BLOCK_N": 64}, num_warps=4, num_stages=3),
    Config({"BLOCK_N": 32}, num_warps=4, num_stages=3),
    Config({"BLOCK_N": 32}, num_warps=8, num_stages=3),
    Config({"BLOCK_N": 16}, num_warps=4, num_stages=3),
    Config({"BLOCK_N": 64}, num_warps=4, num_stages=2),
    Config({"BLOCK_N": 32}, num_warps=4, num_stages=5),
    Config({"BLOCK_N": 64}, num_warps=8, num_stages=3),
    Config({"BLOCK_N": 64}, num_warps=4, num_stages=5),
)
PLAN_CONFIG = Config({"TILE": 1024}, num_warps=4, num_stages=1)
PROGRAMS_CONFIG = Config({"TILE": 256}, num_warps=4, num_stages=1)
MERGE_CONFIG = Config({"PIECES": 8}, num_warps=4, num_stages=1)

#: As many programs of the default tiling run on a multiprocessor at once (see README.md).
PROGRAMS_EACH = 3
QUERY_TYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUPS, QUERY_TOKENS, HEAD_SIZES = (1, 16), (1, 8), (16, 256)


@dataclass(frozen=True)
class DecodeWorkspace:
    """Buffers between the launches of a step, owned by the caller and never moved.

    A step writes them in `plan`, every `decode` reads them. Partial results belong to one layer at
    a time: two layers must not run at once. Memory: `36 * layers * rows * heads` bytes for the
    tasks and `8 * programs * query_tokens * group * (d + 2)` for the partial results; Llama-3.1-8B
    with 256 rows and 528 programs: 2.4 MB and 2.2 MB.

    Attributes:
        rows: most rows of a step.
        heads, group, head_size: H, G, d.
        query_tokens: most query tokens of a row; rows with more are left alone.
        programs: P, programs of an attention launch; 2 to 4 times the number of multiprocessors.
        chunk: entries of a unit of work.
        starts: `[L, rows * H + 1]` int32, first unit of every task; then the number of units.
        tasks: `[L, rows * H, 8]` int32, see `kernel.RECORD`.
        totals: `[L, 2]` int32, tasks and units.
        bounds: `[L, P + 1, 2]` int32, first unit of a program and the task that has it.
        acc: `[2 * P, query_tokens * G, d]` float32, partial weighted sums.
        state: `[2 * P, query_tokens * G, 2]` float32, their maxima (base 2) and sums.
    """

    rows: int
    heads: int
    group: int
    head_size: int
    query_tokens: int
    programs: int
    chunk: int
    starts: Tensor
    tasks: Tensor
    totals: Tensor
    bounds: Tensor
    acc: Tensor
    state: Tensor

    @classmethod
    def empty(
        cls,
        *,
        layers: int,
        rows: int,
        heads: int,
        group: int,
        head_size: int,
        programs: int,
        device: torch.device | str,
        query_tokens: int = 1,
        chunk: int = 64,
    ) -> DecodeWorkspace:
        """Buffers; until the first `plan` there is no work in them.

        Raises:
            ValueError: a number that is out of range.
        """
        for what, given, (least, most) in (
            ("group (query heads of a KV head)", group, GROUPS),
            ("query_tokens", query_tokens, QUERY_TOKENS),
            ("head_size", head_size, HEAD_SIZES),
        ):
            if not least <= given <= most:
                raise ValueError(f"DecodeWorkspace: {what} must be {least}..{most}, got {given}")
        for what, given in (("layers", layers), ("rows", rows), ("heads", heads)):
            if given < 1:
                raise ValueError(f"DecodeWorkspace: {what} must be at least 1, got {given}")
        if programs < 1 or chunk < 16 or chunk & (chunk - 1):
            raise ValueError(
                "DecodeWorkspace: programs must be at least 1 and chunk a power of two from 16 on, "
                f"got {programs} and {chunk}"
            )

        def table(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        most, lines = rows * heads, query_tokens * group
        return cls(
            rows, heads, group, head_size, query_tokens, programs, chunk,
            starts=table(layers, most + 1),
            tasks=table(layers, most, RECORD.value),
            totals=table(layers, 2),
            bounds=table(layers, programs + 1, 2),
            acc=torch.empty(2 * programs, lines, head_size, device=device),
            state=torch.empty(2 * programs, lines, 2, device=device),
        )  # fmt: skip

    @property
    def layers(self) -> int:
        return self.starts.shape[0]

    @property
    def device(self) -> torch.device:
        return self.starts.device

    @property
    def memory(self) -> int:
        """Bytes of all buffers."""
        buffers = (self.starts, self.tasks, self.totals, self.bounds, self.acc, self.state)
        return sum(b.numel() * b.element_size() for b in buffers)


def padded_rows(lines: int, head_size: int) -> int:
    """Lines (query tokens times group) that a program takes: all, or what its registers hold.

    Where it is not all of them, the cache is read more than once.
    """
    most = 64 if head_size <= 128 else 16
    return min(triton.next_power_of_2(max(lines, 16)), most)


def programs(device: torch.device) -> int:
    """Programs of an attention launch: one wave of the default tiling; 4 without a GPU."""
    if device.type != "cuda":
        return 4
    return PROGRAMS_EACH * torch.cuda.get_device_properties(device).multi_processor_count


def pick(lines: int, head_size: int) -> Config:
    """Tiling of `attend_kernel` for this many lines of a task; none of its answers spills."""
    padded = padded_rows(lines, head_size)
    if head_size > 128:
        return CONFIGS[3]
    if padded > 32:
        return CONFIGS[2]
    return CONFIGS[0] if padded == 16 else CONFIGS[1]


def plan(
    workspace: DecodeWorkspace,
    rows: Rows,
    query_start: Tensor,
    holdings: Holdings,
    block_size: int,
) -> None:
    """Cut the work of all layers of a step into equal parts, one a program.

    Args:
        rows: R requests; `lengths` count the tokens of this step too. Rows without query tokens may
            hold anything.
        query_start: `[R + 1]` int32, first query token of every row; ascending.
        holdings: of all layers.
        block_size: of the caches.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    requests = _check_rows("plan", workspace, rows, query_start)
    layers, most = workspace.layers, workspace.rows * workspace.heads
    table = (layers, holdings.slots, workspace.heads)
    for what, tensor, shape in (
        ("rows.slots", rows.slots, (requests,)),
        ("holdings.counts", holdings.counts, table),
        ("holdings.offsets", holdings.offsets, table),
        ("holdings.spans", holdings.spans, (holdings.slots, 2)),
    ):
        _check_int("plan", what, tensor, shape, workspace.device)
    plan_tasks_kernel[(layers,)](
        query_start, rows.lengths, rows.slots, holdings.counts, holdings.offsets, holdings.spans,
        workspace.starts, workspace.tasks, workspace.totals, requests, holdings.slots,
        MOST=most, QUERY_TOKENS=workspace.query_tokens, HEADS=workspace.heads,
        BLOCK_SIZE=block_size, CHUNK=workspace.chunk, **PLAN_CONFIG.meta,
        num_warps=PLAN_CONFIG.num_warps, num_stages=PLAN_CONFIG.num_stages,
    )  # fmt: skip
    programs = workspace.programs
    plan_programs_kernel[(layers, triton.cdiv(programs + 1, PROGRAMS_CONFIG.meta["TILE"]))](
        workspace.starts, workspace.totals, workspace.bounds,
        MOST=most, PROGRAMS=programs, STEPS=most.bit_length(), **PROGRAMS_CONFIG.meta,
        num_warps=PROGRAMS_CONFIG.num_warps, num_stages=PROGRAMS_CONFIG.num_stages,
    )  # fmt: skip


def decode(
    workspace: DecodeWorkspace,
    caches: Caches,
    layer: int,
    query: Tensor,
    out: Tensor,
    query_start: Tensor,
    rows: Rows,
    holdings: Holdings,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Attention of one layer for the rows of the last `plan`, which must have had the same rows.

    Args:
        caches: hold keys and values of this step's tokens already.
        layer: which.
        query: `[T, H * G, d]`, last stride 1; query head `h * G + g` reads KV head h. Query i of m
            of a row sees all entries but the last m - 1 - i. float32 caches take float32 queries,
            bfloat16 bfloat16, float16 float16, float8 all of them.
        out: same shape, last stride 1; tokens of rows with work are written, nothing else is.
        query_start, rows: as in `plan`; only `rows.blocks` is read again.
        holdings: as in `plan`, not read again.
        scale: of the logits.
        softcap: logits x become `softcap * tanh(x / softcap)`; 0: they stay.
        sinks: `[H * G]` float32 logits, added to the denominator of every softmax (not scaled, not
            capped); None: none.
        config: tiling; None means `pick`.

    Returns:
        `out`. Zero where a query sees no entry. The same bits every time.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    _check_rows("decode", workspace, rows, query_start)
    _check_caches(workspace, caches, layer, holdings)
    _check_query(workspace, caches, query, out, sinks)
    w = workspace
    lines = w.query_tokens * w.group
    config = config or pick(lines, w.head_size)
    if w.chunk % config.meta["BLOCK_N"]:
        raise ValueError(f"decode: {config} does not divide the workspace's chunk of {w.chunk}")
    if query.shape[0] == 0 or rows.lengths.shape[0] == 0:
        return out
    shape = {
        "MOST": w.rows * w.heads, "PROGRAMS": w.programs, "QUERY_TOKENS": w.query_tokens,
        "HEADS": w.heads, "GROUP": w.group, "HEAD_SIZE": w.head_size,
        "HAS_SINKS": sinks is not None, "PADDED_SIZE": triton.next_power_of_2(w.head_size),
    }  # fmt: skip
    unread = w.state if sinks is None else sinks
    block, head, token = caches.strides
    lines_each = padded_rows(lines, w.head_size)
    attend_kernel[(w.programs, triton.cdiv(lines, lines_each))](
        query, out, caches.pointers, caches.scales, rows.blocks, unread,
        w.starts, w.tasks, w.bounds, w.acc, w.state,
        layer, rows.blocks.stride(0), query.stride(0), query.stride(1), out.stride(0),
        out.stride(1), float(scale), float(softcap),
        CACHE_TYPE=CACHE_TYPES[caches.dtype], ITEM=caches.dtype.itemsize, SHARED=holdings.shared,
        DOT_TYPE=_dot_type(query.dtype), STRIDE_BLOCK=block, STRIDE_HEAD=head,
        STRIDE_TOKEN=token, BLOCK_SIZE=caches.block_size, CHUNK=w.chunk,
        HAS_SOFTCAP=softcap != 0.0, PADDED_ROWS=lines_each, **shape, **config.meta,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    merge_kernel[(w.programs, w.group)](
        out, caches.scales, unread, w.starts, w.tasks, w.totals, w.bounds, w.acc, w.state,
        layer, out.stride(0), out.stride(1), **shape, **MERGE_CONFIG.meta,
        num_warps=MERGE_CONFIG.num_warps, num_stages=MERGE_CONFIG.num_stages,
    )  # fmt: skip
    return out


def _dot_type(query: torch.dtype) -> tl.dtype:
    """Triton's interpreter multiplies the bits of bfloat16; float32 there."""
    compiled = isinstance(attend_kernel, triton.runtime.JITFunction)
    return CACHE_TYPES[query] if compiled or query != torch.bfloat16 else tl.float32


def _check_rows(name: str, workspace: DecodeWorkspace, rows: Rows, query_start: Tensor) -> int:
    requests = rows.lengths.shape[0] if rows.lengths.dim() == 1 else -1
    if requests > workspace.rows:
        raise ValueError(f"{name}: {requests} rows, the workspace has {workspace.rows}")
    _check_int(name, "rows.lengths", rows.lengths, (requests,), workspace.device)
    _check_int(name, "query_start", query_start, (requests + 1,), workspace.device)
    blocks = rows.blocks
    fits = blocks.dim() == 2 and blocks.shape[0] == requests and blocks.dtype == torch.int32
    if not fits or blocks.device != workspace.device or blocks.stride(1) != 1:
        raise ValueError(
            f"{name}: rows.blocks must be int32 [{requests}, W] on {workspace.device} with last "
            f"stride 1, got {list(blocks.shape)} {blocks.dtype} on {blocks.device}"
        )
    return requests


def _check_int(
    name: str, what: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device
) -> None:
    fits = tuple(tensor.shape) == shape and tensor.dtype == torch.int32
    if not fits or not tensor.is_contiguous() or tensor.device != device:
        raise ValueError(
            f"{name}: {what} must be contiguous int32 {list(shape)} on {device}, got "
            f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )


def _check_caches(
    workspace: DecodeWorkspace, caches: Caches, layer: int, holdings: Holdings
) -> None:
    given = (caches.layers, caches.heads, caches.head_size)
    wanted = (workspace.layers, workspace.heads, workspace.head_size)
    if given != wanted or holdings.counts.shape[0] != workspace.layers:
        raise ValueError(
            f"decode: caches of (layers, heads, head size) {given} with holdings of "
            f"{holdings.counts.shape[0]} layers do not fit a workspace for {wanted}"
        )
    if not 0 <= layer < caches.layers:
        raise ValueError(f"decode: layer must be in 0..{caches.layers - 1}, got {layer}")
    if caches.dtype not in CACHE_TYPES:
        raise ValueError(f"decode: caches must be one of {list(CACHE_TYPES)}, got {caches.dtype}")
    if caches.tensors[layer].data_ptr() % 16:
        raise ValueError(f"decode: the cache of layer {layer} must start at a multiple of 16 bytes")


def _check_query(
    workspace: DecodeWorkspace, caches: Caches, query: Tensor, out: Tensor, sinks: Tensor | None
) -> None:
    heads = workspace.heads * workspace.group
    wanted = (heads, workspace.head_size)
    for what, tensor in (("query", query), ("out", out)):
        fits = tensor.dim() == 3 and tuple(tensor.shape[1:]) == wanted and tensor.stride(2) == 1
        if not fits or tensor.dtype not in QUERY_TYPES or tensor.device != workspace.device:
            raise ValueError(
                f"decode: {what} must be [T, {heads}, {workspace.head_size}], one of "
                f"{list(QUERY_TYPES)}, on {workspace.device} with last stride 1, got "
                f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}, {tensor.stride()}"
            )
    if query.shape[0] != out.shape[0]:
        raise ValueError(f"decode: {query.shape[0]} query tokens but {out.shape[0]} in out")
    if caches.dtype.itemsize > 1 and caches.dtype != query.dtype:
        raise ValueError(f"decode: {query.dtype} queries for caches of {caches.dtype}")
    if sinks is None:
        return
    if tuple(sinks.shape) != (heads,) or sinks.dtype != torch.float32 or sinks.stride(0) != 1:
        raise ValueError(
            f"decode: sinks must be contiguous float32 [{heads}], got {list(sinks.shape)} "
            f"{sinks.dtype}"
        )
    if sinks.device != workspace.device:
        raise ValueError(f"decode: sinks are on {sinks.device}, not {workspace.device}")
