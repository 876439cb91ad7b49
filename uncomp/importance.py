"""How much of its cache each head of a model needs, and what it gets of a budget for all layers.

A model that reads a text a second time, in order to repeat it, looks at what it needs of the first
reading (KVzip, arXiv 2505.23416). Which entries those are depends on the text; how many of them a
head has hardly does: some heads look up everything, others nothing. So it is measured once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from uncomp import budget
from uncomp.kernels.window_scores import window_scores

#: keep ratios that shares are measured at; between them they are interpolated
KEEPS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)


class Needs(Protocol):
    """What the heads of all layers need of one budget."""

    def at(self, keep: float) -> Tensor:
        """`[L, H]` float64, non-negative, at a keep ratio; only proportions matter."""


def looked_up(
    queries: Tensor, keys: Tensor, first: int, scale: float, softcap: float = 0.0
) -> Tensor:
    """The most that any query of the second reading attends to an entry of the first one.

    KVzip's score: the largest attention probability over the queries and the query heads of a KV
    head, among all entries that the query sees.

    Args:
        queries: `[H, G, T, d]` of all T tokens, after RoPE.
        keys: `[H, T, d]`, after RoPE.
        first: tokens of the first reading; those that follow read it again.
        scale, softcap: of the attention logits.

    Returns:
        `[H, first]` float32 (float64 for float64 inputs).
    """
    heads, _, tokens, _ = queries.shape
    at = torch.arange(tokens, device=keys.device)
    scores = window_scores(
        queries[:, :, first:],
        keys,
        torch.full((heads,), tokens, device=keys.device),
        at.expand(heads, -1),
        at[first:],
        scale,
        softcap,
        "max",
        "max",
    )
    return scores[:, :first]


def shares_of(scores: Tensor, keeps: Sequence[float] = KEEPS) -> Tensor:
    """Which part of every head is among the best of all layers and heads.

    Args:
        scores: `[L, H, N]`, of one text.
        keeps: keep ratios in (0, 1].

    Returns:
        `[keeps, L, H]` float64 in 0..1, with the keep ratio as mean (up to ties and rounding).
    """
    flat = scores.flatten().sort(descending=True).values
    last = [flat[max(1, round(keep * flat.numel())) - 1] for keep in keeps]
    return torch.stack([(scores >= least).double().mean(-1) for least in last])


@dataclass(frozen=True)
class Importance:
    """Measured shares of heads.

    Attributes:
        keeps: keep ratios, ascending.
        shares: `[keeps, L, H]` float64 in 0..1, see `shares_of`.
    """

    keeps: tuple[float, ...]
    shares: Tensor

    def at(self, keep: float) -> Tensor:
        """`[L, H]` float64, what heads need at a keep ratio.

        Linear between the measured ratios and up to 1, where all heads need everything; below the
        lowest measured ratio in its proportions.
        """
        if keep <= self.keeps[0]:
            return self.shares[0] * (keep / self.keeps[0])
        above = [*self.keeps, 1.0]
        shares = torch.cat([self.shares, torch.ones_like(self.shares[:1])])
        i = next(i for i, ratio in enumerate(above) if keep <= ratio)
        part = (keep - above[i - 1]) / (above[i] - above[i - 1])
        return torch.lerp(shares[i - 1], shares[i], part)

    def part(self, layers: Sequence[int], heads: slice) -> Importance:
        """Some layers and heads only."""
        return Importance(self.keeps, self.shares[:, list(layers), heads])


@dataclass(frozen=True)
class Pyramid:
    """Less and less from the first layer to the last, as in PyramidKV (arXiv 2406.02069).

    Attributes:
        layers: numbers of these layers in the whole model.
        heads: KV heads of a layer.
        all_layers: of the whole model.
        beta: the last layer gets the mean over this (20, the official default).
    """

    layers: tuple[int, ...]
    heads: int
    all_layers: int
    beta: float = 20.0

    def at(self, keep: float) -> Tensor:
        """`[L, H]` float64 with mean 1 over all layers: linear from 2 - 1 / beta to 1 / beta."""
        last = 1 / self.beta
        depth = torch.tensor(self.layers, dtype=torch.float64) / max(1, self.all_layers - 1)
        shares = (2 - last) + (2 * last - 2) * depth
        return shares[:, None].expand(-1, self.heads)


def deal(needs: Needs, total: int, minimum: Tensor, maximum: Tensor, floor: float) -> Tensor:
    """Deal sub-blocks to the heads of all layers.

    Args:
        needs: of these layers and heads.
        total: sub-blocks of all layers.
        minimum: `[L, H]` int64, sub-blocks a head needs at least.
        maximum: `[L, H]` int64, sub-blocks a head can fill.
        floor: share of an equal budget that every head keeps, 0..1.

    Returns:
        `[L, H]` int64 inside the bounds, sum min(total, sum(maximum)).

    Raises:
        ValueError: sum(minimum) > total.
    """
    weights = needs.at(min(1.0, max(1, total) / max(1, int(maximum.sum()))))
    equal = int(floor * total / minimum.numel())
    least = minimum.clamp_min(equal).minimum(maximum)
    if int(least.sum()) > total:  # the floor gives way where the minima leave no room for it
        least = minimum
    dealt = budget.deal(weights.flatten(), total, least.flatten(), maximum.flatten())
    return dealt.view(minimum.shape)


def in_order(counts: Tensor, each: int, minimum: Tensor, maximum: Tensor) -> Tensor:
    """Make room for every layer among the layers up to it.

    A device writes the survivors of one layer after the other, numbered through all layers, and may
    not overwrite what later layers still have to read: the first i layers together may keep no more
    than i layers have to deal. Where they would keep more, the next layers get it instead. With the
    layers in ascending order of what they keep there is nothing to do.

    Args:
        counts: `[L, H]` int64, sub-blocks, see `deal`.
        each: sub-blocks that a layer has to deal; at least the minimum of every layer.
        minimum, maximum: `[L, H]` int64.

    Returns:
        `[L, H]` int64 inside the bounds; the sum is that of `counts`, less what no layer can take.

    Raises:
        ValueError: a layer whose minimum is larger than `each`.
    """
    if bool((minimum.sum(1) > each).any()):
        raise ValueError(f"layers need up to {int(minimum.sum(1).max())} sub-blocks of {each}")
    found, kept, over = [], 0, 0
    for i, row in enumerate(counts):
        total, room = int(row.sum()), (i + 1) * each - kept
        wanted = min(total + over, room, int(maximum[i].sum()))
        over += total - wanted
        if wanted != total:
            low, high = (minimum[i], row) if wanted < total else (row, maximum[i])
            row = budget.deal(row.double() + 1e-6, wanted, low, high)
        found.append(row)
        kept += wanted
    return torch.stack(found)
