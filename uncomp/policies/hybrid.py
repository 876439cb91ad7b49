"""Part by the attention of the last queries, part by keys: for questions seen and yet to come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from uncomp.kernels.window_scores import Over, Reduce
from uncomp.policies.base import LayerView, Policy
from uncomp.policies.prerope_key_difference import PreropeKeyDifference
from uncomp.policies.registry import register
from uncomp.policies.uniform import Uniform


@register
@dataclass(frozen=True)
class Hybrid(Policy):
    """The best entries of `Uniform` and those of `PreropeKeyDifference`, equal budgets.

    Attention finds what the question at the end of the prompt asks for, and next to nothing of what
    a later turn will; keys that stand out are kept whatever is asked. A sum of both scores is
    neither: attention reaches everywhere a little, and outweighs the keys. So both rank the
    entries, and the budget takes from the two lists in turn.

    Attributes:
        reduce, over: of the attention, see `Uniform`.
        attention_share: part of the budget for attention, in (0, 1); an entry that both lists have
            counts once, and the rest goes further down both.
    """

    name: ClassVar[str] = "hybrid"
    needs_queries: ClassVar[bool] = True
    needs_rotary: ClassVar[bool] = True
    pool_scores: ClassVar[bool] = True

    reduce: Reduce = "sum"
    over: Over = "max"
    attention_share: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.attention_share < 1:
            raise ValueError(
                f"attention_share must be in (0, 1), got {self.attention_share}; policies for all "
                f"or nothing of it are uniform and prerope_key_difference"
            )
        self.parts()

    def parts(self) -> tuple[Policy, ...]:
        return Uniform(self.reduce, self.over), PreropeKeyDifference()

    def score(self, view: LayerView) -> Tensor:
        """Those of the attention, which decide between entries that rank alike."""
        return self.parts()[0].score(view)

    def combine(self, pooled: Sequence[Tensor], eligible: Tensor) -> Tensor:
        """Minus the better one of an entry's two ranks, each over its share of the budget."""
        attention, keys = (_ranks(scores, eligible) for scores in pooled)
        share = self.attention_share
        return -torch.minimum(attention / share, keys / (1 - share))


def _ranks(scores: Tensor, among: Tensor) -> Tensor:
    """`[..., N]` -> `[..., N]` float32, 0 for the best; ties: the earlier entry."""
    masked = torch.where(among & ~scores.isnan(), scores, float("-inf"))
    order = masked.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], dtype=torch.float32, device=scores.device)
    return torch.empty_like(scores, dtype=torch.float32).scatter_(
        -1, order, places.expand(scores.shape)
    )
