"""What a policy sees and what it decides."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from uncomp import budget
from uncomp.kernels.select import TOKENS_A_WORD, Pooling
from uncomp.rotary import Rotary


@dataclass(frozen=True)
class LayerView:
    """One layer's cache of one request, before compression.

    H: KV heads of this rank, G: query heads per KV head, N: padded entries, d: head size,
    w: window.

    Attributes:
        layer: layer index.
        keys: `[H, N, d]` float, after RoPE; garbage (NaN included) beyond `lengths`.
        lengths: `[H]` int64, valid entries per head.
        positions: `[H, N]` int64, token position of every valid entry, ascending.
        queries: `[H, G, w, d]` float, the last w queries after RoPE; None if the policy needs none.
        query_positions: `[w]` int64, ascending; None together with `queries`.
        scale: factor on the attention logits.
        softcap: soft cap of the attention logits, 0 for none.
        entropy: `[H]` normalised head entropies; None if the policy needs none.
        rotary: how the keys were rotated; None if they were not, or if the policy need not know.
    """

    layer: int
    keys: Tensor
    lengths: Tensor
    positions: Tensor
    queries: Tensor | None = None
    query_positions: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    entropy: Tensor | None = None
    rotary: Rotary | None = None

    def valid(self) -> Tensor:
        """`[H, N]` bool, False for padding."""
        return torch.arange(self.keys.shape[1], device=self.keys.device) < self.lengths[:, None]


class Policy(ABC):
    """Scores the entries of a layer and deals the layer's sub-blocks to its heads.

    Attributes:
        name: key in the registry.
        needs_queries: `score` reads the queries.
        needs_entropy: `deal` reads the entropies.
        needs_rotary: `score` reads how keys were rotated.
        deals_by_score: `deal` reads the scores.
        pool_scores: scores are pooled over neighbouring entries before the choice.
        like_everywhere: scores are of a like size everywhere, so that what is summed up around an
            entry must have as many terms as around any other: they are pooled by tokens where
            others are by words, inside sentences of any length.
    """

    name: ClassVar[str]
    needs_queries: ClassVar[bool] = False
    needs_entropy: ClassVar[bool] = False
    needs_rotary: ClassVar[bool] = False
    deals_by_score: ClassVar[bool] = False
    pool_scores: ClassVar[bool] = False
    like_everywhere: ClassVar[bool] = False

    @abstractmethod
    def score(self, view: LayerView) -> Tensor:
        """Importance of every entry.

        Returns:
            `[H, N]` float32 (float64 for float64 keys), higher means keep. Padding is never NaN but
            otherwise meaningless.
        """

    def parts(self) -> tuple["Policy", ...]:
        """Policies whose scores are pooled each for itself and then combined; this one alone."""
        return (self,)

    def pooling(self, kind: Pooling, length: int) -> tuple[Pooling, int]:
        """How these scores are pooled where the settings say `kind` and `length`."""
        if kind == "word" and self.like_everywhere:
            return "ema", TOKENS_A_WORD * length
        return kind, length

    def combine(self, pooled: Sequence[Tensor], eligible: Tensor) -> Tensor:
        """One score of the pooled scores of the parts; tensor operations only.

        Args:
            pooled: `[..., H, N]` each, in the order of `parts`.
            eligible: `[..., H, N]` bool, entries the choice is made from.

        Returns:
            `[..., H, N]`, higher means keep; meaningless where not eligible.
        """
        return pooled[0]

    def deal(
        self,
        view: LayerView,
        pooled: Tensor,
        eligible: Tensor,
        total: int,
        minimum: Tensor,
        maximum: Tensor,
        block_size: int,
    ) -> Tensor:
        """Sub-blocks for every head of one layer.

        Args:
            view: the layer.
            pooled: `[H, N]` scores after pooling.
            eligible: `[H, N]` bool, entries the choice is made from.
            total: sub-blocks of the layer.
            minimum: `[H]` int64, sub-blocks a head needs at least.
            maximum: `[H]` int64, sub-blocks a head can fill.
            block_size: tokens in a sub-block.

        Returns:
            `[H]` int64 inside the bounds, sum min(total, sum(maximum)).

        Raises:
            ValueError: sum(minimum) > total, or no entropies where the policy needs them.
        """
        if self.needs_entropy and view.entropy is None:
            raise ValueError(f"policy {self.name!r} needs the head entropies of layer {view.layer}")
        units = torch.tensor(total, device=minimum.device)
        return self.share(view.entropy, pooled, eligible, units, minimum, maximum, block_size)

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
        """`deal` for any number of layers and requests at once; equal shares unless overridden.

        Tensor operations only, so that nothing waits for a GPU.

        Args:
            entropy: `[..., H]`; None unless `needs_entropy`.
            pooled, eligible: `[..., H, N]`; None unless `deals_by_score`.
            total: `[...]` integers.
            minimum, maximum: `[..., H]` int64.
            block_size: tokens in a sub-block.

        Returns:
            `[..., H]` int64.
        """
        weights = torch.ones(minimum.shape, dtype=torch.float64, device=minimum.device)
        return budget.deal(weights, total, minimum, maximum)
