"""Which tokens enter a stage: scores from the attention of the layer before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uncomp.kernels.select import Pooling, pool_scores
from uncomp.kernels.window_scores import Over, window_scores


@dataclass(frozen=True)
class Choice:
    """How the last queries of a prompt choose.

    Attributes:
        queries: how many of them.
        over: how their probabilities combine, "sum" or "max".
        pooling, pooling_kind: how far a score reaches, see `uncomp.kernels.select.pool_scores`.
    """

    queries: int
    over: Over
    pooling: int
    pooling_kind: Pooling

    def scores(
        self,
        queries: Tensor,
        keys: Tensor,
        query_positions: Tensor,
        positions: Tensor,
        scale: float,
        softcap: float = 0.0,
    ) -> Tensor:
        """What every token gets from the last queries, summed over the heads; not pooled.

        Sums over heads are what tensor-parallel ranks add up.

        Args:
            queries: `[H, G, w, d]` of the layer before the stage, after RoPE; the last
                `self.queries` of the w are used.
            keys: `[H, N, d]` of the same layer.
            query_positions: `[w]` int64.
            positions: `[N]` int64, of the tokens that the layer has read.
            scale, softcap: of the attention logits.

        Returns:
            `[N]` float32.
        """
        heads = keys.shape[0]
        lengths = torch.full((heads,), keys.shape[1], device=keys.device)
        per_head = window_scores(
            queries[:, :, -self.queries :],
            keys,
            lengths,
            positions.expand(heads, -1),
            query_positions[-self.queries :],
            scale,
            softcap,
            over=self.over,
        )
        return per_head.sum(0)


CHOICES: dict[str, Choice] = {
    # what scores the KV cache by default, and wins here too (docs/prefill.md)
    "handed-on": Choice(32, "max", 16, "ema"),
    # UNComp: all heads and the last eight queries of the layer before
    "attention": Choice(8, "sum", 1, "max"),
}
#: queries that any of them looks at
WIDEST = max(choice.queries for choice in CHOICES.values())


def choose_tokens(
    scores: Tensor,
    forced: Tensor,
    recent: int,
    keep: int,
    choice: Choice,
    places: Tensor | None = None,
) -> Tensor:
    """The tokens that go on.

    Args:
        scores: `[N]` float, of `Choice.scores`, summed over all heads.
        forced: `[N]` bool, tokens that stay in any case, beside the recent ones.
        recent: last tokens that stay in any case; their scores are not handed on.
        keep: how many stay, at most N.
        choice: says how scores are pooled.
        places: `[N]` integers, not falling: where every token stands, for choices that pool by
            words.

    Returns:
        `[keep]` int64 indices, ascending. Ties: pooled score, then raw score, then the earlier
        token.

    Raises:
        ValueError: more forced tokens than `keep`, or more to keep than there are.
    """
    if keep > scores.shape[0]:
        raise ValueError(f"choose_tokens: {keep} of {scores.shape[0]} tokens are to stay")
    recent = min(recent, scores.shape[0])
    old = scores.shape[0] - recent
    limit = torch.full((1,), old, device=scores.device)
    at = None if places is None else places.unsqueeze(0)
    pooled = pool_scores(scores.unsqueeze(0), choice.pooling, choice.pooling_kind, limit, at)[0]
    stay = forced | (torch.arange(scores.shape[0], device=scores.device) >= old)
    if scores.is_cpu and int(stay.sum()) > keep:  # anywhere else this would wait for the device
        raise ValueError(f"choose_tokens: {int(stay.sum())} tokens are forced, {keep} are to stay")
    # From the last criterion to the first, each sort stable; their number is known beforehand, so
    # that nothing waits for a device.
    order = _descending(scores)
    order = order[_descending(pooled[order])]
    order = order[_descending(stay[order].to(torch.uint8))]
    return order[:keep].sort().values


def _descending(values: Tensor) -> Tensor:
    """Stable order from the largest on; NaN ranks lowest."""
    if values.is_floating_point():
        values = values.masked_fill(values.isnan(), float("-inf"))
    return values.argsort(descending=True, stable=True)
