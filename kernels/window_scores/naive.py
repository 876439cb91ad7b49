"""Torch reference of the window scores (SnapKV, arXiv 2404.14469; UNComp, arXiv 2410.03090)."""

from typing import Literal

import torch
from torch import Tensor

Reduce = Literal["sum", "max"]
Over = Literal["sum", "max"]


def window_scores(
    queries: Tensor,
    keys: Tensor,
    lengths: Tensor,
    positions: Tensor,
    query_positions: Tensor,
    scale: float,
    softcap: float = 0.0,
    reduce: Reduce = "sum",
    over: Over = "sum",
) -> Tensor:
    """Attention probability every cache entry receives from the last w queries.

    A query at position p sees the valid entries whose position is at most p. Probabilities are
    reduced over the window and then over the G query heads that share a KV head.

    Args:
        queries: `[H, G, w, d]`, after RoPE.
        keys: `[H, N, d]`, after RoPE; entries beyond `lengths` may be anything, NaN included.
        lengths: `[H]` int64, valid entries per head.
        positions: `[H, N]` int64, token position of every valid entry.
        query_positions: `[w]` int64.
        scale: factor on the logits, usually `d ** -0.5`.
        softcap: logits become `softcap * tanh(logits / softcap)`; 0 switches it off.
        reduce: "sum" or "max" over the query heads of a KV head.
        over: "sum" (SnapKV) or "max" over the window. One query that looks for a token is reason
            enough to keep it, however many others do not.

    Returns:
        `[H, N]` float32 (float64 for float64 inputs), non-negative; 0 beyond `lengths`.

    Raises:
        ValueError: shapes that do not fit, or an unknown `reduce` or `over`.
    """
    _check(queries, keys, lengths, positions, query_positions)
    for name, value in (("reduce", reduce), ("over", over)):
        if value not in ("sum", "max"):
            raise ValueError(f"window_scores: {name} must be 'sum' or 'max', got {value!r}")
    heads, group, window, size = queries.shape
    entries = keys.shape[1]
    dtype = _accumulator(queries, keys)
    if entries == 0 or window == 0:
        return keys.new_zeros((heads, entries), dtype=dtype)
    rows = (queries.to(dtype) * scale).reshape(heads, group * window, size)
    valid = torch.arange(entries, device=keys.device) < lengths[:, None]  # [H, N]
    # Most entries are seen by all queries; only columns from the first other one on need a mask.
    seen = valid & (positions <= query_positions.min())
    plain = seen.all(0)
    start = entries if bool(plain.all()) else int(plain.to(torch.uint8).argmin())  # the first other
    hidden = positions[:, None, start:] > query_positions[:, None]  # [H, w, entries - start]
    hidden |= ~valid[:, None, start:]
    blind = None  # [H, w], queries that see nothing
    if not bool(seen.any(1).all()):
        blind = (~valid[:, None] | (positions[:, None] > query_positions[:, None])).all(2)
    scores = rows.new_empty(heads, entries)
    # A head at a time, into the same memory: what one step writes, the next reads from the cache.
    converted = rows.new_empty(entries, size)
    logits, probabilities = rows.new_empty(2, group, window, entries)
    for head in range(heads):
        converted.copy_(keys[head])
        torch.mm(rows[head], converted.T, out=logits.view(group * window, entries))
        if softcap > 0:
            logits.div_(softcap).tanh_().mul_(softcap)
        # A key only reaches its own column, so masking afterwards also removes NaN keys.
        logits[..., start:].masked_fill_(hidden[head], float("-inf"))
        torch.softmax(logits, -1, out=probabilities)
        if blind is not None:  # their softmax is 0/0
            probabilities.masked_fill_(blind[head, None, :, None], 0.0)
        if reduce == over == "sum":
            torch.sum(probabilities, (0, 1), out=scores[head])
            continue
        each = probabilities.sum(1) if over == "sum" else probabilities.amax(1)
        scores[head] = each.sum(0) if reduce == "sum" else each.amax(0)
    return scores


def _accumulator(*tensors: Tensor) -> torch.dtype:
    is_double = any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if is_double else torch.float32


def _check(
    queries: Tensor,
    keys: Tensor,
    lengths: Tensor,
    positions: Tensor,
    query_positions: Tensor,
) -> None:
    if queries.dim() != 4 or keys.dim() != 3:
        raise ValueError(
            "window_scores needs queries [H, G, w, d] and keys [H, N, d], got "
            f"{list(queries.shape)} and {list(keys.shape)}"
        )
    heads, _, window, size = queries.shape
    expected = {
        "keys": (keys, (heads, keys.shape[1], size)),
        "lengths": (lengths, (heads,)),
        "positions": (positions, (heads, keys.shape[1])),
        "query_positions": (query_positions, (window,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"window_scores: {name} must be {list(shape)}, got {list(tensor.shape)}"
            )
