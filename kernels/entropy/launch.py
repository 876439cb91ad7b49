"""Launcher of the Triton kernels: entropies of a batch of covariances, without the host."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from uncomp.kernels.variant import Config

from .kernel import entropy_kernel, tridiagonal_kernel
from .naive import MEASURES, Measure, default_truncation

#: of the tridiagonalisation; the first that fits is the default, see `pick`
CONFIGS = (
    Config({"ROWS": 32}, num_warps=4, num_stages=1),
    Config({"ROWS": 16}, num_warps=8, num_stages=1),
    Config({"ROWS": 32}, num_warps=8, num_stages=1),
    Config({"ROWS": 64}, num_warps=8, num_stages=1),
)
BISECTION_CONFIGS = (
    Config({"HALVINGS": 30}, num_warps=4, num_stages=1),
    Config({"HALVINGS": 30}, num_warps=2, num_stages=1),
)
HEAD_SIZES = (2, 256)


@dataclass(frozen=True)
class Scratch:
    """Working memory for B matrices; contents have no meaning before or after, but `eigenvalues`.

    Attributes:
        matrix: `[B, d, d]` float32.
        vectors: `[B, 4, P]` float32, P = d rounded up to a power of two.
        diagonal, squares: `[B, d]` float32, tridiagonal form and squares of its subdiagonal.
        eigenvalues: `[B, d]` float32, afterwards the normalised spectrum, descending, sum 1 (all
            zeros for a zero matrix).
    """

    matrix: Tensor
    vectors: Tensor
    diagonal: Tensor
    squares: Tensor
    eigenvalues: Tensor

    @classmethod
    def empty(cls, batch: int, size: int, device: torch.device | str) -> Scratch:
        """For `batch` matrices `[size, size]`."""
        padded = triton.next_power_of_2(size)
        return cls(
            torch.empty(batch, size, size, device=device),
            torch.empty(batch, 4, padded, device=device),
            torch.empty(batch, size, device=device),
            torch.empty(batch, size, device=device),
            torch.empty(batch, size, device=device),
        )

    def part(self, batch: int) -> Scratch:
        """For the first `batch` matrices only; views."""
        return Scratch(
            self.matrix[:batch], self.vectors[:batch], self.diagonal[:batch],
            self.squares[:batch], self.eigenvalues[:batch],
        )  # fmt: skip


def pick(size: int) -> Config:
    """Tiling of the tridiagonalisation for head size `size`."""
    return CONFIGS[0] if size <= 128 else CONFIGS[1]


def spectral_entropy(
    covariance: Tensor,
    k: int | None = None,
    measure: Measure = "renormalized",
    scratch: Scratch | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
    bisection: Config | None = None,
) -> Tensor:
    """Truncated entropy of the spectra of symmetric positive semi-definite matrices, over ln d.

    The same as `truncated_entropy(spectrum(covariance), k, measure)` of `naive.py`, but NaN and
    infinity are not refused (the host would have to look): they give NaN.

    Args:
        covariance: `[B, d, d]` float32, contiguous; only the symmetric part counts, and the scale
            does not. Unchanged.
        k, measure: see `truncated_entropy`.
        scratch: of B matrices; None allocates.
        out: `[B]` float32; None allocates.
        config, bisection: tiling; None means `pick(d)` and the first of `BISECTION_CONFIGS`.

    Returns:
        `out`, in [0, 1]. 0 for a zero matrix. Two launches, no synchronisation.

    Raises:
        ValueError: shapes or dtypes that do not fit, k outside 1..d, an unknown measure.
    """
    batch, size, kept = _check(covariance, k, measure)
    if scratch is None:
        scratch = Scratch.empty(batch, size, covariance.device)
    if out is None:
        out = torch.empty(batch, device=covariance.device)
    padded = triton.next_power_of_2(size)
    for what, tensor, shape in (
        ("scratch.matrix", scratch.matrix, (batch, size, size)),
        ("scratch.vectors", scratch.vectors, (batch, 4, padded)),
        ("scratch.diagonal", scratch.diagonal, (batch, size)),
        ("scratch.squares", scratch.squares, (batch, size)),
        ("scratch.eigenvalues", scratch.eigenvalues, (batch, size)),
        ("out", out, (batch,)),
    ):
        _check_float(what, tensor, shape, covariance.device)
    if batch == 0:
        return out
    config = config or pick(size)
    tridiagonal_kernel[(batch,)](
        covariance, scratch.matrix, scratch.vectors, scratch.diagonal, scratch.squares,
        HEAD_SIZE=size, PADDED=padded, **config.meta,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    bisection = bisection or BISECTION_CONFIGS[0]
    entropy_kernel[(batch,)](
        scratch.diagonal, scratch.squares, scratch.eigenvalues, out, 1.0 / math.log(size),
        KEPT=kept, RENORMALIZED=measure == "renormalized", HEAD_SIZE=size, PADDED=padded,
        **bisection.meta, num_warps=bisection.num_warps, num_stages=bisection.num_stages,
    )  # fmt: skip
    return out


def renyi2_entropy(covariance: Tensor) -> Tensor:
    """Rényi entropy of order 2 over ln d: -ln Σ λ² / ln d = -ln ‖Σ‖²_F / ln d. No eigenvalues.

    Args:
        covariance: `[B, d, d]` float, symmetric, any scale.

    Returns:
        `[B]` in its dtype, in [0, 1], never above the `full` entropy; 0 for a zero matrix. See
        README.md for how well it ranks heads.
    """
    size = _check_square("renyi2_entropy", covariance)
    power = covariance.square().sum((1, 2))
    trace = covariance.diagonal(dim1=1, dim2=2).sum(-1)
    # `==` and not `<=`: NaN must stay NaN.
    ratio = torch.where(power == 0, 1.0, trace.square() / power)
    return (ratio.log() / math.log(size)).clamp(0.0, 1.0)


def _check_square(name: str, covariance: Tensor) -> int:
    shape = covariance.shape
    least, most = HEAD_SIZES
    if len(shape) != 3 or shape[1] != shape[2] or not least <= shape[1] <= most:
        raise ValueError(
            f"{name} needs covariances [B, d, d] with d in {least}..{most}, got {list(shape)}"
        )
    return shape[1]


def _check(covariance: Tensor, k: int | None, measure: str) -> tuple[int, int, int]:
    size = _check_square("spectral_entropy", covariance)
    _check_float("covariance", covariance, tuple(covariance.shape), covariance.device)
    if measure not in MEASURES:
        raise ValueError(f"unknown entropy measure {measure!r}; allowed: {', '.join(MEASURES)}")
    kept = size if measure == "full" else default_truncation(size) if k is None else k
    if not 1 <= kept <= size:
        raise ValueError(f"truncation k must be in 1..{size} (the head size), got {kept}")
    return covariance.shape[0], size, kept


def _check_float(what: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    fits = tuple(tensor.shape) == shape and tensor.dtype == torch.float32
    if not fits or not tensor.is_contiguous() or tensor.device != device:
        raise ValueError(
            f"spectral_entropy: {what} must be contiguous float32 {list(shape)} on {device}, got "
            f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )
