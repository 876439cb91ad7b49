"""Torch reference of the choice of cache entries."""

import math
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LOWEST = float("-inf")

Pooling = Literal["max", "ema", "word"]
POOLINGS: tuple[str, ...] = get_args(Pooling)

#: places from word to word; from token to token of a word it is one
UNIT = 16
#: entries that stand so many places apart hand nothing on to each other, see `ema_pool`
BREAK = 1 << 14
#: entries that a score reaches for every word that it is to reach
TOKENS_A_WORD = 4


def pool_scores(
    raw: Tensor,
    width: int,
    kind: Pooling,
    limit: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """How a score reaches the entries around it: `max_pool`, or `ema_pool` with this length.

    Args:
        kind: "word" is `ema_pool` by `places`; the others do not look at them.

    Raises:
        ValueError: an unknown kind, "word" without places, and what these two reject.
    """
    if kind not in POOLINGS:
        raise ValueError(f"pool_scores: kind must be one of {list(POOLINGS)}, got {kind!r}")
    if kind == "max":
        return max_pool(raw, width, limit)
    if kind == "word" and places is None:
        raise ValueError("pool_scores: kind 'word' needs the place of every entry")
    return ema_pool(raw, width, limit, places if kind == "word" else None)


def max_pool(raw: Tensor, width: int, limit: Tensor | None = None) -> Tensor:
    """Largest score within `width // 2` entries to either side (entry order, not positions).

    Args:
        raw: `[H, N]` float scores; may be anything, NaN included, from `limit` on.
        width: odd number of entries, 1 is the identity.
        limit: `[H]` int64; only entries below `limit[h]` take part. None: all.

    Returns:
        `[H, N]`, dtype of `raw`; -inf from `limit` on.

    Raises:
        ValueError: `width` not a positive odd number, or shapes that do not fit.
    """
    if width < 1 or width % 2 == 0:
        raise ValueError(f"max_pool: width must be a positive odd number, got {width}")
    inside = _inside("max_pool", raw, limit)
    if inside is not None:
        raw = raw.masked_fill(~inside, LOWEST)
    if width == 1 or raw.numel() == 0:
        return raw
    pooled = F.max_pool1d(raw, width, stride=1, padding=width // 2)
    return pooled if inside is None else pooled.masked_fill(~inside, LOWEST)


def ema_pool(
    raw: Tensor, length: int, limit: Tensor | None = None, places: Tensor | None = None
) -> Tensor:
    """Exponential moving average to both sides, twice as far to the entries after a score.

    The window's queries find where something begins (a name, the word before a number); what has
    to be said stands after it, and what is named after its value a little before it. So the score
    of entry i reaches entry j with the weight exp(-d / length) for j >= i and exp(-d / before),
    before = max(1, length / 2), otherwise. Not divided by the sum of the weights, because only the
    order counts.

    The distance d is |j - i| entries, or |places[j] - places[i]| / UNIT where places are given: in
    words, so that a number counts about once however many tokens it has. From BREAK places on
    nothing is handed on: what is found in one sentence says little about the next
    (docs/quality.md). Tokens of a word are a little apart, so that they do not tie.

    Weights end where they are below exp(-4), after `reach(length)` entries, the own one included,
    and before `reach(before)`; by places after four times as many entries.

    Args:
        raw: `[H, N]` float scores, finite below `limit` (probabilities are); may be anything, NaN
            included, from there on.
        length: after which a score has fallen by e, at least 1.
        limit: `[H]` int64; only entries below `limit[h]` take part. None: all.
        places: `[H, N]` integers, not falling along N below the limit. None: one after the other.

    Returns:
        `[H, N]`, dtype of `raw`; -inf from `limit` on.

    Raises:
        ValueError: `length` below 1, or shapes that do not fit.
    """
    if length < 1:
        raise ValueError(f"ema_pool: length must be at least 1, got {length}")
    inside = _inside("ema_pool", raw, limit)
    if places is not None and places.shape != raw.shape:
        raise ValueError(
            f"ema_pool needs places like raw {list(raw.shape)}, got {list(places.shape)}"
        )
    if raw.numel() == 0:
        return raw
    if inside is not None:
        raw = raw.masked_fill(~inside, 0.0)
    after = _trail(raw, length, places)
    turned = None if places is None else -places.flip(1)
    before = _trail(raw.flip(1), before_length(length), turned).flip(1)
    pooled = after + before - raw
    return pooled if inside is None else pooled.masked_fill(~inside, LOWEST)


def before_length(length: int) -> float:
    """Before which a score has fallen by e, see `ema_pool`."""
    return max(1.0, length / 2)


def reach(length: float, by_place: bool = False) -> int:
    """Entries that a score reaches to one side, its own included: a power of two."""
    entries = 4 * length * (TOKENS_A_WORD if by_place else 1)
    return 1 << math.ceil(math.log2(entries))


def _trail(raw: Tensor, length: float, places: Tensor | None) -> Tensor:
    """Sum over t < reach of exp(-d / length) times the score t entries before, d apart."""
    out, step, count = raw, 1, raw.shape[1]
    while step < min(reach(length, places is not None), count):
        # What 1, 2, 4, ... entries have summed up so far.
        moved = F.pad(out[:, :-step], (step, 0))
        if places is None:
            moved = moved * math.exp(-step / length)
        else:
            # Below 0 only beyond the limit, where scores are 0 and places may be anything.
            apart = places[:, step:] - places[:, : count - step]
            weight = torch.exp(-apart.clamp_min(0).to(raw.dtype) / (UNIT * length)).masked_fill(
                apart >= BREAK, 0.0
            )
            moved[:, step:] *= weight
        out = out + moved
        step *= 2
    return out


def _inside(name: str, raw: Tensor, limit: Tensor | None) -> Tensor | None:
    """`[H, N]` bool, which entries take part; None: all."""
    if raw.dim() != 2 or (limit is not None and tuple(limit.shape) != (raw.shape[0],)):
        given = None if limit is None else list(limit.shape)
        raise ValueError(f"{name} needs raw [H, N] and limit [H], got {list(raw.shape)}, {given}")
    if limit is None:
        return None
    return torch.arange(raw.shape[1], device=raw.device) < limit[:, None]


def top_entries(
    pooled: Tensor, raw: Tensor, eligible: Tensor, forced: Tensor, keep: Tensor
) -> Tensor:
    """The entries of every head that stay: all forced ones, then the best eligible ones.

    Best means pooled score descending, then raw score descending, then lower index; NaN ranks
    lowest. Pooling makes plateaus, so the tie rules matter: they make the choice deterministic.

    Args:
        pooled: `[H, N]` float.
        raw: `[H, N]` float.
        eligible: `[H, N]` bool, entries that may stay; scores elsewhere are not looked at.
        forced: `[H, N]` bool, entries that stay in any case (eligible or not).
        keep: `[H]` int64, entries to keep; `min(keep, number of eligible or forced)` are.

    Returns:
        `[H, K]` int64 indices, ascending, padded with -1 at the end; K = min(max(keep), N).

    Raises:
        ValueError: shapes that do not fit, or more forced entries than `keep` in some head.
    """
    _check(pooled, raw, eligible, forced, keep)
    open_slots = keep - forced.sum(1)
    if bool((open_slots < 0).any()):
        raise ValueError(
            f"top_entries: {forced.sum(1).tolist()} entries per head are forced but only "
            f"{keep.tolist()} may be kept; raise keep or force fewer"
        )
    width = min(int(keep.max()), pooled.shape[1]) if keep.numel() else 0
    if width == 0:
        return torch.full((pooled.shape[0], 0), -1, dtype=torch.int64, device=pooled.device)

    above, tied = _split(pooled, eligible & ~forced, open_slots)
    chosen = forced | above
    chosen |= _best_tied(raw, tied, keep - chosen.sum(1))
    return _indices(chosen, width)


def _split(score: Tensor, among: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The entries of `among` strictly better than the count-th best one, and those equal to it."""
    masked = torch.where(among & ~score.isnan(), score, LOWEST)
    # One rank per head is all that is needed; sorting would take several times as long.
    ranks = (score.shape[1] + 1 - count).clamp(1, score.shape[1])
    threshold = score.new_empty(score.shape[0], 1)
    for rank in ranks.unique().tolist():
        alike = ranks == rank
        threshold[alike] = _rank(masked[alike], rank)
    return among & (masked > threshold) & (count > 0)[:, None], among & (masked == threshold)


def _rank(score: Tensor, rank: int) -> Tensor:
    """`[H, 1]`, the rank-th smallest of every row, from 1; no NaN."""
    if score.is_cpu:  # NumPy partitions with vector instructions, several times as fast
        part = np.partition(score.numpy(), rank - 1, axis=1)
        return torch.from_numpy(part[:, rank - 1 : rank])
    return score.kthvalue(rank, keepdim=True).values


def _best_tied(raw: Tensor, tied: Tensor, count: Tensor) -> Tensor:
    """`[H, N]` bool, the `count` best tied entries: raw score descending, then lower index."""
    heads, entries = tied.nonzero(as_tuple=True)
    score = raw[heads, entries]
    order = score.masked_fill(score.isnan(), LOWEST).argsort(descending=True, stable=True)
    order = order[heads[order].argsort(stable=True)]
    rank = _rank_in_head(heads[order], tied.sum(1))
    best = order[rank < count[heads[order]]]
    chosen = torch.zeros_like(tied)
    chosen[heads[best], entries[best]] = True
    return chosen


def _indices(chosen: Tensor, width: int) -> Tensor:
    heads, entries = chosen.nonzero(as_tuple=True)  # row-major: ascending inside a head
    slots = _rank_in_head(heads, chosen.sum(1))
    result = torch.full((chosen.shape[0], width), -1, dtype=torch.int64, device=chosen.device)
    result[heads, slots] = entries
    return result


def _rank_in_head(heads: Tensor, counts: Tensor) -> Tensor:
    """0, 1, ... for the entries of every head, listed head after head; `counts` of each head."""
    first = counts.cumsum(0) - counts
    return torch.arange(len(heads), device=heads.device) - first[heads]


def _check(pooled: Tensor, raw: Tensor, eligible: Tensor, forced: Tensor, keep: Tensor) -> None:
    shapes = {tuple(t.shape) for t in (pooled, raw, eligible, forced)}
    if pooled.dim() != 2 or len(shapes) != 1 or tuple(keep.shape) != (pooled.shape[0],):
        raise ValueError(
            "top_entries needs pooled, raw, eligible, forced [H, N] and keep [H], got "
            f"{[list(t.shape) for t in (pooled, raw, eligible, forced, keep)]}"
        )
