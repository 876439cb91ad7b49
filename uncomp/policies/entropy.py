"""Budgets by the matrix entropy of a head (UNComp, arXiv 2410.03090)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from uncomp import budget, grouping
from uncomp.policies.registry import register
from uncomp.policies.uniform import Uniform


@register
@dataclass(frozen=True)
class Entropy(Uniform):
    """Scores like `Uniform`; heads of higher entropy keep more.

    Attributes:
        groups: equal groups the heads of a layer are ranked into; at most the number of heads.
        ratio: budget of the highest group over that of the lowest; 1 is uniform.
        reverse: high entropy keeps less instead.
    """

    name: ClassVar[str] = "entropy"
    needs_entropy: ClassVar[bool] = True

    groups: int = 2
    ratio: float = 2.0
    reverse: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        budget.group_shares(self.groups, self.ratio)  # rejects bad values now, not in a request

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
        """Shares linear in the entropy group; see `Policy.share` and `budget.group_shares`."""
        assert entropy is not None
        count = min(self.groups, entropy.shape[-1])
        shares = budget.group_shares(count, self.ratio)
        if self.reverse:
            shares.reverse()
        group = grouping.groups(entropy, count)
        # Compared, not indexed: a table would have to be copied to the device, waiting for it.
        weights = sum((group == g).to(torch.float64) * share for g, share in enumerate(shares))
        assert isinstance(weights, Tensor)
        return budget.deal(weights, total, minimum, maximum)
