"""Variants for servers that do not know whether a prompt's question is in its window."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from uncomp.eval.ablation import choose
from uncomp.eval.ablation.replay import Reading, Replay
from uncomp.eval.ablation.shared import Named, both, by_words, unrotated, windows


def robust(reading: Reading, replay: Replay, budget: int, always: Tensor) -> Iterator[Named]:
    """Attention of the last queries and keys before RoPE, in one choice."""
    attention = by_words(windows(reading, replay)[32, "max", "sum"], reading, replay)
    difference = both(unrotated(reading, replay), 8, 16)

    yield "uncomp", choose.by_score(attention, budget, always)
    yield "uniform", choose.uniform(attention, budget, always)
    yield "key-difference-prerope", choose.uniform(difference, budget, always)
    for share in (0.25, 0.5, 0.75):
        yield f"union{share}", _union(attention, difference, share, budget, always)
    for share in (0.25, 0.5):
        mixed = choose.unit(attention) ** share * choose.unit(difference) ** (1 - share)
        yield f"geometric{share}", choose.uniform(mixed, budget, always)


def _union(first: Tensor, second: Tensor, share: float, budget: int, always: Tensor) -> Tensor:
    """The best by the first scores, `share` of the budget, then the best of the rest."""
    own = max(int(always.sum()), round(share * budget))
    chosen = choose.uniform(first, own, always)
    ranked = second.masked_fill(chosen, torch.inf)
    return choose.uniform(ranked, budget, always)
