"""Budgets by where a layer's best scores are (Ada-KV, arXiv 2407.11550)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from uncomp import budget
from uncomp.policies.registry import register
from uncomp.policies.uniform import Uniform


@register
@dataclass(frozen=True)
class AdaKV(Uniform):
    """Scores like `Uniform`; a head's budget is its number of entries among the layer's best.

    Attributes:
        floor: share of the uniform budget that every head keeps, 0..1 (0.2 in the paper).
        equal_from: heads share equally where each would have at least so many tokens; 0: nowhere,
            as in the paper. What one head can spare another can use only where tokens are short.
    """

    name: ClassVar[str] = "adakv"
    deals_by_score: ClassVar[bool] = True

    floor: float = 0.2
    equal_from: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be in 0..1, got {self.floor}")
        if self.equal_from < 0:
            raise ValueError(f"equal_from must be at least 0, got {self.equal_from}")

    def share(
        self,
        entropy: Tensor | None,
        pooled: Tensor | None,
        eligible: Tensor | None,
        total: Tensor,
        minimum: Tensor,
        maximum: Tensor,
        block_size: int,
    ) -> Tensor:
        """Shares by the count of best entries, in whole sub-blocks; see `Policy.share`."""
        assert pooled is not None
        assert eligible is not None
        is_enough = total * block_size >= self.equal_from * minimum.shape[-1]
        is_enough = is_enough & (self.equal_from > 0)
        if is_enough.is_cpu and bool(is_enough.all()):  # elsewhere this would wait for the device
            counts = torch.ones_like(minimum)
        else:
            counts = best_per_head(pooled, eligible, total * block_size)
            counts = torch.where(is_enough.unsqueeze(-1), 1, counts)
        # The floor gives way where the bounds leave no room for it.
        equal = (self.floor * total / minimum.shape[-1]).to(torch.int64)
        floor = torch.maximum(minimum, equal.unsqueeze(-1)).minimum(maximum)
        fits = floor.sum(-1, keepdim=True) <= total.unsqueeze(-1)
        floor = torch.where(fits, floor, minimum)
        return budget.deal(counts.to(torch.float64), total, floor, maximum)


def best_per_head(score: Tensor, eligible: Tensor, keep: Tensor) -> Tensor:
    """How many of a layer's best entries lie in each head.

    Args:
        score: `[..., H, N]` float; NaN ranks lowest.
        eligible: `[..., H, N]` bool; other entries do not compete.
        keep: `[...]` integers, entries of a layer.

    Returns:
        `[..., H]` int64, sum min(keep, number of eligible entries). Ties go to the lower head, then
        to the lower entry.
    """
    among = eligible.flatten(-2)
    masked = torch.where(among & ~score.flatten(-2).isnan(), score.flatten(-2), float("-inf"))
    threshold = _ranked(masked, keep.clamp(1, masked.shape[-1])).unsqueeze(-1)
    above = among & (masked > threshold) & (keep > 0).unsqueeze(-1)
    tied = among & (masked == threshold)
    left = keep - above.sum(-1)
    chosen = above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= left.unsqueeze(-1)))
    return chosen.unflatten(-1, score.shape[-2:]).sum(-1)


def _ranked(score: Tensor, rank: Tensor) -> Tensor:
    """The rank-th largest of every row, `[..., M]` and `[...]` from 1 on -> `[...]`; no NaN.

    A sort would find it too, in several times the time on a CPU and the memory on a GPU.
    """
    if score.is_cpu:
        rows, ranks = score.reshape(-1, score.shape[-1]).numpy(), rank.reshape(-1).tolist()
        at = [row.size - one for row, one in zip(rows, ranks, strict=True)]
        found = [np.partition(row, place)[place] for row, place in zip(rows, at, strict=True)]
        return torch.tensor(np.array(found)).view(rank.shape)
    return _bisected(score, rank)


def _bisected(score: Tensor, rank: Tensor) -> Tensor:
    """`_ranked` for float32 without waiting for the device: bit by bit from the top."""
    bits = torch.where(score == 0, 0.0, score).contiguous().view(torch.int32)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the scores
    # Written as an offset from the smallest integer, the answer's bits are found one by one.
    found = torch.full_like(rank, -(2**31), dtype=torch.int64)
    for bit in range(31, -1, -1):
        trial = found + (1 << bit)
        enough = (key >= trial.unsqueeze(-1)).sum(-1) >= rank
        found = torch.where(enough, trial, found)
    found = found.to(torch.int32)
    return (found ^ ((found >> 31) & 0x7FFFFFFF)).view(torch.float32)
