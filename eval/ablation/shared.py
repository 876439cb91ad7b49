"""What sets of variants share: what is computed once per reading, and head weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from uncomp.config import UncompConfig
from uncomp.eval.ablation import choose, features
from uncomp.eval.ablation.replay import Reading, Replay
from uncomp.kernels.entropy import Measure, spectrum, truncated_entropy
from uncomp.kernels.gram import gram
from uncomp.kernels.select import ema_pool
from uncomp.spans import Vocabulary, places

SINKS = 4
RECENT = 8

#: name and what each head keeps, `[L, H, N]` bool
Named = tuple[str, Tensor]

_memo: dict[Any, Any] = {}


def forget() -> None:
    """Before the next reading."""
    _memo.clear()


def once(key: Any, make: Callable[[], Any]) -> Any:
    """What `make` returns, computed once per reading."""
    if key not in _memo:
        _memo[key] = make()
    return _memo[key]


def windows(reading: Reading, replay: Replay) -> dict[tuple[int, str, str], Tensor]:
    """Window scores by (width, over the window, over the group)."""
    return cast(
        dict[tuple[int, str, str], Tensor],
        once("windows", lambda: features.windows(reading, replay.scale, [8, 16, 32, 64])),
    )


def value_norm(reading: Reading) -> Tensor:
    """`[L, H, N]`."""
    return cast(Tensor, once("vnorm", lambda: features.value_norm(reading)))


def unrotated(reading: Reading, replay: Replay) -> Tensor:
    """Difference of keys before RoPE, `[L, H, N]`."""
    back = -torch.arange(reading.tokens)
    return cast(
        Tensor,
        once("unrotated", lambda: features.difference(replay.rotate(reading.keys, back))),
    )


def by_words(scores: Tensor, reading: Reading, replay: Replay) -> Tensor:
    """Scores as the engine hands them on by default."""
    at = once("places", lambda: _places(replay.tokenizer, reading.ids))
    length = UncompConfig(keep=1.0).pooling
    flat = scores.flatten(0, 1)
    return ema_pool(flat, length, None, at.expand_as(flat)).view_as(scores)


def both(scores: Tensor, before: float, after: float, kind: str = "sum") -> Tensor:
    """Scores that reach to both sides, see `choose.trail`; `before` 0: only to one."""
    ahead = choose.trail(scores, after, kind)
    if not before:
        return ahead
    behind = choose.trail(scores.flip(-1), before, kind).flip(-1)
    return ahead + behind - scores if kind == "sum" else torch.maximum(ahead, behind)


def entropy(reading: Reading, measure: str) -> Tensor:
    """Of the heads' keys, from about 1,024 tokens, `[L, H]`."""

    def measured() -> Tensor:
        layers, heads, tokens, _ = reading.keys.shape
        keys = reading.keys[:, :, :: max(1, tokens // 1024)].flatten(0, 1)
        counts = torch.full((layers * heads,), keys.shape[1])
        values = spectrum(gram(keys, counts).covariance(), torch.float32)
        return truncated_entropy(values, None, cast(Measure, measure)).view(layers, heads)

    return cast(Tensor, once(("entropy", measure), measured))


@functools.cache
def vocabulary(tokenizer: Any) -> Vocabulary:
    """What the tokens say."""
    return Vocabulary.of(tokenizer)


def _places(tokenizer: Any, ids: tuple[int, ...]) -> Tensor:
    gaps = vocabulary(tokenizer).gaps(ids).tobytes()
    return torch.from_numpy(places(gaps, len(ids)))


def ranked(values: Tensor, ratio: float, reverse: bool = False) -> Tensor:
    """Weights linear in the rank within the layer, top / bottom = ratio."""
    rank = values.argsort(-1).argsort(-1).double()
    if reverse:
        rank = values.shape[-1] - 1 - rank
    return 1 + (ratio - 1) * rank / max(1, values.shape[-1] - 1)
