"""Raw scores of tokens from a reading: what the queries of some tokens attend to, and others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from uncomp.eval.ablation.replay import Reading


def window(
    reading: Reading, scale: float, width: int, over: str = "sum", group: str = "sum"
) -> Tensor:
    """Attention of the last `width` queries, `[L, H, N]`, reduced over queries, then the group."""
    layers = []
    for queries, keys in zip(reading.queries, reading.keys, strict=True):
        layers.append(_reduce(_probabilities(queries, keys, scale, width), over, group))
    return torch.stack(layers)


def windows(
    reading: Reading, scale: float, widths: list[int]
) -> dict[tuple[int, str, str], Tensor]:
    """`window` for several widths at once, by (width, over, group)."""
    most = max(widths)
    found: dict[tuple[int, str, str], list[Tensor]] = {}
    for queries, keys in zip(reading.queries, reading.keys, strict=True):
        weights = _probabilities(queries, keys, scale, most)
        for width in widths:
            for over in ("sum", "max"):
                for group in ("sum", "max"):
                    part = _reduce(weights[:, :, most - width :], over, group)
                    found.setdefault((width, over, group), []).append(part)
    return {name: torch.stack(parts) for name, parts in found.items()}


def fading(reading: Reading, scale: float, width: int, ages: list[float]) -> dict[float, Tensor]:
    """The largest attention of the last `width` queries, older ones counting less.

    Args:
        ages: queries after which a weight falls by e.
    """
    found: dict[float, list[Tensor]] = {}
    for queries, keys in zip(reading.queries, reading.keys, strict=True):
        weights = _probabilities(queries, keys, scale, width)
        old = torch.arange(width - 1, -1, -1).float()
        for age in ages:
            faded = weights * (-old / age).exp()[:, None]
            found.setdefault(age, []).append(faded.amax(2).sum(1))
    return {age: torch.stack(parts) for age, parts in found.items()}


def _probabilities(queries: Tensor, keys: Tensor, scale: float, width: int) -> Tensor:
    """`[H, G, width, N]`."""
    _, group, tokens, _ = queries.shape
    rows = queries[:, :, tokens - width :].flatten(1, 2) * scale
    logits = (rows @ keys.transpose(1, 2)).unflatten(1, (group, width))
    at = torch.arange(tokens - width, tokens)
    logits.masked_fill_(torch.arange(tokens) > at[:, None], float("-inf"))
    return logits.softmax(-1)


def _reduce(weights: Tensor, over: str, group: str) -> Tensor:
    weights = weights.sum(2) if over == "sum" else weights.amax(2)
    return weights.sum(1) if group == "sum" else weights.amax(1)


def probes(reading: Reading, scale: float, count: int, over: str = "sum", near: int = 0) -> Tensor:
    """Attention of `count` evenly spaced queries over the tokens before each, `[L, H, N]`.

    A token is seen only by the probes after it: "sum" is divided by their number.

    Args:
        near: tokens directly before a probe that it does not vote for.
    """
    tokens = reading.tokens
    at = torch.linspace(tokens / count, tokens - 1, count).long()
    layers = []
    for queries, keys in zip(reading.queries, reading.keys, strict=True):
        rows = queries[:, :, at].flatten(1, 2) * scale
        logits = (rows @ keys.transpose(1, 2)).unflatten(1, (-1, count))
        place = torch.arange(tokens)
        logits.masked_fill_(place > at[:, None], float("-inf"))
        weights = logits.softmax(-1)
        weights.masked_fill_(place > (at - near)[:, None], 0.0)
        if over == "sum":
            seen = (place <= (at - near)[:, None]).sum(0).clamp_min(1)
            layers.append(weights.sum((1, 2)) / seen)
        else:
            layers.append(weights.amax((1, 2)))
    return torch.stack(layers)


def moved_probes(
    reading: Reading, scale: float, count: int, rotate, ahead: int = 64, over: str = "sum"
) -> Tensor:
    """As if `count` evenly spaced queries were asked after the prompt, `[L, H, N]`.

    Args:
        rotate: (tensor [..., n, d], offsets [n]) -> rotated by so many positions (RoPE).
        ahead: how far after the end.
    """
    tokens = reading.tokens
    at = torch.linspace(64, tokens - 1, count).long()
    layers = []
    for queries, keys in zip(reading.queries, reading.keys, strict=True):
        rows = rotate(queries[:, :, at], tokens + ahead - at).flatten(1, 2) * scale
        weights = (rows @ keys.transpose(1, 2)).softmax(-1)
        layers.append(weights.sum(1) if over == "sum" else weights.amax(1))
    return torch.stack(layers)


def key_difference(reading: Reading) -> Tensor:
    """KeyDiff's score, see `difference`."""
    return difference(reading.keys)


def difference(vectors: Tensor) -> Tensor:
    """1 - cosine with the mean direction of the head, `[L, H, N]` from `[L, H, N, d]`."""
    unit = F.normalize(vectors, dim=-1)
    mean = F.normalize(unit.sum(2), dim=-1)
    return 1 - (unit * mean[:, :, None]).sum(-1)


def value_norm(reading: Reading) -> Tensor:
    """`[L, H, N]`."""
    return torch.linalg.vector_norm(reading.values, dim=-1)
