"""Launchers of the Triton kernels: statistics and covariance of keys on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from uncomp.kernels.paged import Caches, Holdings, Rows
from uncomp.kernels.paged.types import CACHE_TYPES
from uncomp.kernels.variant import Config

from .kernel import covariance_kernel, gram_paged_kernel, gram_rows_kernel
from .naive import GramStats

#: the first is the default; the others are timed by the GPU benchmark
CONFIGS = (
    Config({"TILE": 64, "ROWS": 32}, num_warps=4, num_stages=3),
    Config({"TILE": 64, "ROWS": 32}, num_warps=4, num_stages=2),
    Config({"TILE": 64, "ROWS": 64}, num_warps=8, num_stages=2),
    Config({"TILE": 128, "ROWS": 32}, num_warps=8, num_stages=2),
)
COVARIANCE_CONFIGS = (Config({"TILE": 32}, num_warps=4, num_stages=1),)
#: rows whose mean is the shift
SAMPLE = 64

HEAD_SIZES = (16, 256)


@dataclass(frozen=True)
class GramBuffers:
    """Statistics around a shift s near the mean. L layers, R requests, H heads; contiguous.

    Attributes:
        shift: `[L, R, H, d]` float32, s.
        outer: `[L, R, H, d, d]` float32, sum of (x - s)(x - s)ᵀ.
        total: `[L, R, H, d]` float32, sum of x - s.
        count: `[L, R, H]` int32, number of rows.
    """

    shift: Tensor
    outer: Tensor
    total: Tensor
    count: Tensor

    @classmethod
    def empty(
        cls, layers: int, requests: int, heads: int, size: int, device: torch.device | str
    ) -> GramBuffers:
        """Uninitialised buffers: the launchers write every place."""
        shape = (layers, requests, heads)
        return cls(
            torch.empty(*shape, size, device=device),
            torch.empty(*shape, size, size, device=device),
            torch.empty(*shape, size, device=device),
            torch.empty(shape, dtype=torch.int32, device=device),
        )

    def part(self, start: int, stop: int) -> GramBuffers:
        """Layers `[start, stop)` only; views."""
        return GramBuffers(
            self.shift[start:stop], self.outer[start:stop], self.total[start:stop],
            self.count[start:stop],
        )  # fmt: skip

    def statistics(self) -> GramStats:
        """The same around zero, in float64 (a shifted float32 sum would lose the spread).

        Returns:
            GramStats of L·R·H heads. They add up, whatever the shifts were.
        """
        size = self.shift.shape[-1]
        shift = self.shift.view(-1, size).double()
        total = self.total.view(-1, size).double()
        count = self.count.view(-1).long()
        mass = shift * count[:, None]
        outer = self.outer.view(-1, size, size).double()
        outer = (
            outer + shift[:, :, None] * total[:, None, :] + total[:, :, None] * shift[:, None, :]
        )
        outer += mass[:, :, None] * shift[:, None, :]
        return GramStats(outer, total + mass, count)


def pick() -> Config:
    """Tiling of the statistics kernels."""
    return CONFIGS[0]


def gram_paged(
    caches: Caches,
    rows: Rows,
    holdings: Holdings,
    stride: Tensor,
    out: GramBuffers | None = None,
    config: Config | None = None,
) -> GramBuffers:
    """Statistics of the keys that every head of every request and layer holds, in one launch.

    Args:
        caches, rows, holdings: see `uncomp.kernels.paged`.
        stride: `[R]` int32; entries 0, stride, 2·stride, ... of every head of this request count.
            Below 1: the request is left alone, nothing of it is written.
        out: written; None allocates.
        config: tiling; None means `pick()`.

    Returns:
        `out`. FP8 keys are dequantised. The shift is the mean of at most 64 of the entries.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    requests = _check_paged(caches, rows, holdings, stride)
    layers, heads, size = caches.layers, caches.heads, caches.head_size
    if out is None:
        out = GramBuffers.empty(layers, requests, heads, size, caches.device)
    _check_out("gram_paged", out, (layers, requests, heads, size))
    config = config or pick()
    tiles = triton.cdiv(size, config.meta["TILE"])
    if requests == 0:
        return out
    gram_paged_kernel[(tiles * tiles * heads, requests, layers)](
        caches.pointers, caches.all.pointers, caches.scales, rows.blocks, rows.lengths, rows.slots,
        holdings.counts, holdings.offsets, holdings.spans, stride,
        out.shift, out.outer, out.total, out.count,
        holdings.slots, holdings.start, rows.blocks.stride(0), *caches.strides,
        CACHE_TYPE=CACHE_TYPES[caches.dtype], ITEM=caches.dtype.itemsize, SHARED=holdings.shared,
        DOT_TYPE=_dot_type(), HEADS=heads,
        HEAD_SIZE=size, BLOCK_SIZE=caches.block_size, SAMPLE=SAMPLE, **config.meta,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def gram_rows(
    x: Tensor,
    starts: Tensor,
    seen: Tensor,
    stride: Tensor,
    out: GramBuffers,
    config: Config | None = None,
) -> GramBuffers:
    """Add the rows of a dense tensor, a chunk of keys or queries, to the statistics of one layer.

    Args:
        x: `[T, H, d]`, last stride 1; the chunks of R requests after one another.
        starts: `[R + 1]` int32; request r owns rows `starts[r]` to `starts[r + 1]`.
        seen: `[R]` int32, rows of this stream before the chunk. 0 begins anew: whatever `out` holds
            is ignored. Otherwise the chunk is added, around the shift of the first one.
        stride: `[R]` int32; the rows whose number in the stream is a multiple of it count, wherever
            chunks begin. Below 1: the request is left alone.
        out: buffers of one layer, `[1, R, H, ...]`; written.

    Returns:
        `out`. Empty chunks are legal; a stream's first chunk must hold a row for the shift.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    if x.dim() != 3 or (x.shape[2] > 1 and x.stride(2) != 1) or x.dtype not in CACHE_TYPES:
        raise ValueError(
            "gram_rows needs x [T, H, d] with last stride 1, of a dtype out of "
            f"{_names()}; got {list(x.shape)}, strides {x.stride()}, {x.dtype}"
        )
    heads, size = x.shape[1:]
    _check_size("gram_rows", size)
    requests = seen.shape[0] if seen.dim() == 1 else -1
    _check_table("gram_rows", "seen", seen, (requests,), x.device)
    _check_table("gram_rows", "starts", starts, (requests + 1,), x.device)
    _check_table("gram_rows", "stride", stride, (requests,), x.device)
    _check_out("gram_rows", out, (1, requests, heads, size))
    config = config or pick()
    tiles = triton.cdiv(size, config.meta["TILE"])
    if requests == 0:
        return out
    gram_rows_kernel[(tiles * tiles * heads, requests)](
        x, starts, seen, stride, out.shift, out.outer, out.total, out.count,
        x.stride(0), x.stride(1),
        DOT_TYPE=_dot_type(), HEADS=heads, HEAD_SIZE=size, SAMPLE=SAMPLE, **config.meta,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def covariance(buffers: GramBuffers, out: Tensor | None = None) -> Tensor:
    """Covariances with trace one.

    Args:
        out: `[L, R, H, d, d]` float32, written; None allocates.

    Returns:
        `out`: symmetric; zero for a head without spread (no row, one row, all rows equal; the rule
        of `GramStats.covariance`); NaN where the keys had NaN or infinity.

    Raises:
        ValueError: `out` of another shape or dtype.
    """
    size = buffers.outer.shape[-1]
    if out is None:
        out = torch.empty_like(buffers.outer)
    if out.shape != buffers.outer.shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(
            f"covariance: out must be contiguous float32 {list(buffers.outer.shape)}, got "
            f"{list(out.shape)} {out.dtype}"
        )
    matrices = buffers.count.numel()
    if matrices == 0:
        return out
    config = COVARIANCE_CONFIGS[0]
    tiles = triton.cdiv(size, config.meta["TILE"])
    covariance_kernel[(tiles * tiles, matrices)](
        buffers.shift, buffers.outer, buffers.total, buffers.count, out,
        HEAD_SIZE=size, PADDED=triton.next_power_of_2(size), **config.meta,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def _dot_type() -> tl.dtype:
    """See `add_products`."""
    compiled = isinstance(gram_paged_kernel, triton.runtime.JITFunction)
    return tl.bfloat16 if compiled else tl.float32


def _names() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in CACHE_TYPES)


def _check_paged(caches: Caches, rows: Rows, holdings: Holdings, stride: Tensor) -> int:
    name, device = "gram_paged", caches.device
    if caches.dtype not in CACHE_TYPES:
        raise ValueError(f"{name}: caches of {caches.dtype}; allowed: {_names()}")
    _check_size(name, caches.head_size)
    if any(tensor.data_ptr() % 16 for tensor in caches.tensors):
        raise ValueError(f"{name}: every layer's cache must begin at a multiple of 16 bytes")
    requests = rows.lengths.shape[0] if rows.lengths.dim() == 1 else -1
    table = (caches.layers, holdings.slots, caches.heads)
    for what, tensor, shape in (
        ("rows.lengths", rows.lengths, (requests,)),
        ("rows.slots", rows.slots, (requests,)),
        ("stride", stride, (requests,)),
        ("holdings.counts", holdings.counts, table),
        ("holdings.offsets", holdings.offsets, table),
        ("holdings.spans", holdings.spans, (holdings.slots, 2)),
    ):
        _check_table(name, what, tensor, shape, device)
    blocks = rows.blocks
    if blocks.dim() != 2 or blocks.shape[0] != requests or blocks.dtype != torch.int32:
        raise ValueError(
            f"{name}: rows.blocks must be int32 [{requests}, W], got {list(blocks.shape)} "
            f"{blocks.dtype}"
        )
    return requests


def _check_size(name: str, size: int) -> None:
    least, most = HEAD_SIZES
    if not least <= size <= most:
        raise ValueError(f"{name}: head size must be in {least}..{most}, got {size}")


def _check_table(
    name: str, what: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device
) -> None:
    fits = tuple(tensor.shape) == shape and tensor.dtype == torch.int32
    if not fits or not tensor.is_contiguous() or tensor.device != device:
        raise ValueError(
            f"{name}: {what} must be contiguous int32 {list(shape)} on {device}, got "
            f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )


def _check_out(name: str, out: GramBuffers, shape: tuple[int, int, int, int]) -> None:
    *head, size = shape
    wanted = {"shift": shape, "outer": (*shape, size), "total": shape, "count": tuple(head)}
    for field, expected in wanted.items():
        tensor = getattr(out, field)
        dtype = torch.int32 if field == "count" else torch.float32
        if tuple(tensor.shape) != expected or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: out.{field} must be contiguous {dtype} {list(expected)}, got "
                f"{list(tensor.shape)} {tensor.dtype}"
            )
