"""Torch reference of the covariance statistics behind the matrix entropy."""

from dataclasses import dataclass

import torch
from torch import Tensor

#: elements that a loop over heads works on at a time: 1 MB, half of a core's second-level cache
_CACHED = 2**18


@dataclass(frozen=True)
class GramStats:
    """Additive statistics of H sets of row vectors; `a + b` describes the union of the two sets.

    Attributes:
        outer: `[H, d, d]` float64, sum of x xᵀ.
        total: `[H, d]` float64, sum of x.
        count: `[H]` int64, number of rows.
    """

    outer: Tensor
    total: Tensor
    count: Tensor

    def __add__(self, other: "GramStats") -> "GramStats":
        return GramStats(
            self.outer + other.outer, self.total + other.total, self.count + other.count
        )

    def covariance(self) -> Tensor:
        """(S/N - μ μᵀ) divided by its trace.

        Returns:
            `[H, d, d]` float64, symmetric, trace 1. Zero for a head without spread (no rows, one
            row, or all rows equal), where the quotient is 0/0.
        """
        count = self.count.clamp_min(1).to(torch.float64)
        moment = self.outer / count[:, None, None]
        mean = self.total / count[:, None]
        centred = moment - _outer(mean, mean)
        # The subtraction leaves rounding noise, which is no spread.
        noise = 64 * torch.finfo(self.outer.dtype).eps * _trace(moment)
        return _unit_trace(centred, noise)


def gram(x: Tensor, lengths: Tensor, stride: int = 1) -> GramStats:
    """Sums of x xᵀ and x over the valid rows of every head.

    Args:
        x: `[H, N, d]` float; rows beyond `lengths` may be anything, NaN included.
        lengths: `[H]` int64, valid rows per head.
        stride: use rows 0, stride, 2·stride, ... only. Statistics of chunks add up to those of the
            whole exactly when every chunk starts on a multiple of `stride`.

    Returns:
        GramStats. Products are accumulated in float32 (float64 for float64 `x`) around the mean, so
        that a mean far larger than the spread costs no accuracy.

    Raises:
        ValueError: shapes that do not fit, or `stride` below 1.
    """
    _check("gram", x, lengths)
    if stride < 1:
        raise ValueError(f"gram: stride must be at least 1, got {stride}")
    count = (lengths + stride - 1) // stride
    x = x[:, ::stride]
    heads, _, size = x.shape
    centred = x.new_empty(heads, size, size, dtype=torch.float64)
    rest, shift = x.new_empty(2, heads, size, dtype=torch.float64)
    # A few heads at a time, into the same memory, which then stays in the cache.
    few = max(1, _CACHED // max(1, x[0].numel())) if heads else 1
    memory = torch.empty_like(x[:few], dtype=_accumulator(x))
    for first in range(0, heads, few):
        part = slice(first, first + few)
        rows, mean = _centred_rows(x[part], count[part], memory)
        centred[part] = torch.bmm(rows.transpose(1, 2), rows)
        rest[part] = rows.sum(1)  # rounding left by the shift, nearly zero
        shift[part] = mean
    mass = shift * count[:, None]
    outer = centred + _outer(shift, rest) + _outer(rest, shift) + _outer(mass, shift)
    return GramStats(outer, rest + mass, count.to(torch.int64))


def unit_norm_covariance(x: Tensor, lengths: Tensor) -> Tensor:
    """Covariance of rows that are centred and then scaled to unit length.

    The two-pass form of the UNComp reference implementation (the Diff-eRank construction, arXiv
    2401.17139). It needs the mean first and is therefore not additive over chunks.

    Args:
        x: `[H, N, d]` float; rows beyond `lengths` may be anything, NaN included.
        lengths: `[H]` int64, valid rows per head.

    Returns:
        `[H, d, d]` float64, symmetric, trace 1. Rows equal to the mean have no direction and weigh
        nothing; a head with only such rows gets zero.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check("unit_norm_covariance", x, lengths)
    centred, mean = _centred_rows(x, lengths, torch.empty_like(x, dtype=_accumulator(x)))
    norm = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    count = lengths.clamp_min(1)[:, None, None]
    size = torch.linalg.vector_norm(mean, dim=-1)[:, None, None] + norm.sum(1, True) / count
    is_mean = norm <= 64 * torch.finfo(centred.dtype).eps * size
    unit = torch.where(is_mean, 0.0, centred / norm)
    outer = torch.bmm(unit.transpose(1, 2), unit).to(torch.float64)
    return _unit_trace(outer, torch.zeros_like(outer[:, 0, 0]))


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _centred_rows(x: Tensor, count: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Rows minus their mean, zero beyond `count`, `[H, N, d]`; and the mean, `[H, d]`.

    Works in place on the first H of `memory` `[>= H, N, d]`, whose dtype both have: the passes over
    memory are the cost.
    """
    rows = memory[: x.shape[0]].copy_(x)
    padded = [(head, n) for head, n in enumerate(count.tolist()) if n < x.shape[1]]
    for head, n in padded:
        rows[head, n:] = 0.0
    mean = rows.sum(1) / count.clamp_min(1)[:, None].to(rows.dtype)
    rows -= mean[:, None]
    for head, n in padded:
        rows[head, n:] = 0.0
    return rows, mean


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left[:, :, None] * right[:, None, :]


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def _unit_trace(matrix: Tensor, noise: Tensor) -> Tensor:
    symmetric = (matrix + matrix.transpose(-2, -1)) / 2
    trace = _trace(symmetric)
    has_spread = (trace > noise)[:, None, None]
    return torch.where(has_spread, symmetric / trace[:, None, None], 0.0)


def _check(name: str, x: Tensor, lengths: Tensor) -> None:
    if x.dim() != 3 or tuple(lengths.shape) != (x.shape[0],):
        raise ValueError(
            f"{name} needs x [H, N, d] and lengths [H], got {list(x.shape)} and "
            f"{list(lengths.shape)}"
        )
