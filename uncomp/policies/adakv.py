"""Budgets by where a layer's best scores are (Ada-KV, arXiv 2407.11550)."""

from dataclasses import dataclass
from typing import ClassVar

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
    """

    name: ClassVar[str] = "adakv"
    deals_by_score: ClassVar[bool] = True

    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be in 0..1, got {self.floor}")

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
        counts = best_per_head(pooled, eligible, total * block_size)
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
    ranked = masked.sort(-1, descending=True).values
    last = (keep - 1).clamp(0, masked.shape[-1] - 1).unsqueeze(-1)
    threshold = ranked.gather(-1, last)
    above = among & (masked > threshold) & (keep > 0).unsqueeze(-1)
    tied = among & (masked == threshold)
    left = keep - above.sum(-1)
    chosen = above | (tied & (tied.cumsum(-1) <= left.unsqueeze(-1)))
    return chosen.unflatten(-1, score.shape[-2:]).sum(-1)
