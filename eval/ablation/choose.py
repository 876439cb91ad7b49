"""From raw scores to what each head keeps; `[L, H, N]` throughout."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from uncomp import budget
from uncomp.kernels.select import reach
from uncomp.policies.adakv import best_per_head


def spread(raw: Tensor, back: int, forward: int, kind: str = "max") -> Tensor:
    """A token's score reaches `back` tokens before it and `forward` after it."""
    padded = F.pad(raw, (forward, back), value=0.0).flatten(0, 1)
    width = back + forward + 1
    pool = F.max_pool1d if kind == "max" else F.avg_pool1d
    return pool(padded, width, stride=1).view(raw.shape)


def trail(raw: Tensor, distance: float, kind: str = "max") -> Tensor:
    """A token's score reaches those after it, falling by e every `distance` tokens.

    "max": the best of what reaches a token; "sum": all of it.
    """
    out, step = raw, 1
    while step < reach(distance):  # doubling: what 1, 2, 4, ... tokens have handed on
        moved = F.pad(out, (step, 0))[..., : raw.shape[-1]] * math.exp(-step / distance)
        out = torch.maximum(out, moved) if kind == "max" else out + moved
        step *= 2
    return out


def unit(raw: Tensor) -> Tensor:
    """Every head's scores sum to 1."""
    return raw / raw.sum(-1, keepdim=True).clamp_min(1e-20)


def agree(scores: Tensor, share: float, over: str = "all", how: str = "mean") -> Tensor:
    """Own score mixed with what the heads of the layer, or all heads, think of the token."""
    own = unit(scores)
    axes = (0, 1) if over == "all" else (1,)
    mean = how == "mean"
    common = own.mean(axes, keepdim=True) if mean else unit(own.amax(axes, keepdim=True))
    return (1 - share) * own + share * common


def forced(tokens: int, sinks: int, recent: int) -> Tensor:
    place = torch.arange(tokens)
    return (place < sinks) | (place >= tokens - recent)


def uniform(scores: Tensor, keep: int, always: Tensor) -> Tensor:
    """Every head keeps `keep` tokens."""
    masked = scores.masked_fill(always, float("inf"))
    index = masked.topk(keep, -1).indices
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, index, True)


def by_score(scores: Tensor, keep: int, always: Tensor, floor: float = 0.2) -> Tensor:
    """Ada-KV: shares by where the layer's best are, at least `floor` of an equal share."""
    layers, heads, _ = scores.shape
    eligible = (~always).expand(scores.shape)
    least = int(always.sum())
    counts = best_per_head(scores, eligible, torch.full((layers,), (keep - least) * heads))
    low = torch.full((layers, heads), max(int(floor * keep), least))
    high = torch.full((layers, heads), scores.shape[-1])
    total = torch.full((layers,), keep * heads)
    shares = budget.deal((counts + least).double(), total, low, high)
    return ragged(scores, shares, always)


def by_weight(scores: Tensor, keep: int, always: Tensor, weights: Tensor) -> Tensor:
    """Shares in proportion to `weights` `[L, H]` within each layer."""
    layers, heads, tokens = scores.shape
    low = torch.full((layers, heads), int(always.sum()))
    total = torch.full((layers,), keep * heads)
    return ragged(scores, budget.deal(weights.double(), total, low, low * 0 + tokens), always)


def over_layers(scores: Tensor, keep: int, always: Tensor, floor: float = 0.2) -> Tensor:
    """Ada-KV's rule over all heads of all layers: what unequal layers could bring."""
    flat = scores.flatten(0, 1)[None]
    return by_score(flat, keep, always, floor)[0].view(scores.shape)


def ragged(scores: Tensor, shares: Tensor, always: Tensor) -> Tensor:
    masked = scores.masked_fill(always, float("inf"))
    order = torch.argsort(masked, dim=-1, descending=True, stable=True)
    chosen = torch.arange(scores.shape[-1]) < shares[..., None]
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, order, chosen)
