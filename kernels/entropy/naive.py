"""Torch reference of the truncated matrix entropy (UNComp, arXiv 2410.03090)."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Measure = Literal["raw", "renormalized", "full"]
MEASURES: tuple[str, ...] = get_args(Measure)


def spectrum(covariance: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normalised eigenvalues of symmetric positive semi-definite matrices.

    Args:
        covariance: `[B, d, d]` float; only its symmetric part counts.
        dtype: precision of the eigenvalue problem.

    Returns:
        `[B, d]` in `dtype`, descending, non-negative, sum 1. A zero matrix (a head without spread)
        gives (1, 0, ..., 0), the spectrum of entropy 0.

    Raises:
        ValueError: not a batch of square matrices, or NaN or infinity inside.
    """
    if covariance.dim() != 3 or covariance.shape[1] != covariance.shape[2]:
        raise ValueError(f"spectrum needs [B, d, d], got {list(covariance.shape)}")
    matrix = covariance.to(dtype)
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("spectrum: the covariance contains NaN or infinity; check the inputs")
    matrix = (matrix + matrix.transpose(1, 2)) / 2
    values = torch.linalg.eigvalsh(matrix).flip(-1).clamp_min(0.0)
    total = values.sum(-1, keepdim=True)
    lowest = torch.zeros_like(values)
    lowest[:, :1] = 1.0
    return torch.where(total > 0, values / total, lowest)


def truncated_entropy(
    eigenvalues: Tensor,
    k: int | None = None,
    measure: Measure = "raw",
    normalized: bool = True,
) -> Tensor:
    """Entropy of the k largest eigenvalues, natural logarithm.

    Args:
        eigenvalues: `[B, d]`, non-negative, sum 1 (see `spectrum`).
        k: eigenvalues kept, 1..d; None means `default_truncation(d)`. Ignored by "full".
        measure: "raw" is -Σ_{i≤k} λ ln λ, as published; it is not monotone in the spread of the
            spectrum. "renormalized" divides the k values by their sum first. "full" is k = d.
        normalized: divide by ln d, so that the result lies in [0, 1].

    Returns:
        `[B]`, dtype of `eigenvalues`. 0 for d = 1.

    Raises:
        ValueError: wrong shape, `k` outside 1..d, or an unknown measure.
    """
    if eigenvalues.dim() != 2:
        raise ValueError(
            f"truncated_entropy needs eigenvalues [B, d], got {list(eigenvalues.shape)}"
        )
    if measure not in MEASURES:
        raise ValueError(f"unknown entropy measure {measure!r}; allowed: {', '.join(MEASURES)}")
    size = eigenvalues.shape[1]
    kept = size if measure == "full" else default_truncation(size) if k is None else k
    if not 1 <= kept <= size:
        raise ValueError(f"truncation k must be in 1..{size} (the head size), got {kept}")
    top = eigenvalues.sort(-1, descending=True).values[:, :kept]
    if measure == "renormalized":
        top = top / top.sum(-1, keepdim=True)
    # Rounding can leave ln d by an ulp on either side; the range is a promise.
    entropy = torch.special.entr(top).sum(-1).clamp(0.0, math.log(size))
    return entropy / math.log(size) if normalized and size > 1 else entropy


def default_truncation(size: int) -> int:
    """Eigenvalues kept for head size `size`: a quarter (32 of 128 as in UNComp), at least 1."""
    return max(1, size // 4)
