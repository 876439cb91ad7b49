"""Spans: scores that are handed on inside a sentence or from word to word, not by tokens alone.

A number, a UUID or a long name is many tokens of one word, and how many depends on the tokenizer;
its digits after the first are what a compressed cache loses. And what is found in a sentence says
little about the next one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uncomp.eval.ablation import choose
from uncomp.eval.ablation.replay import Reading, Replay
from uncomp.eval.ablation.shared import (
    Named,
    both,
    by_words,
    once,
    vocabulary,
    windows,
)
from uncomp.kernels.select import UNIT
from uncomp.spans import SENTENCE


def words(texts: list[str]) -> Tensor:
    """`[N]` bool: whether a token begins a word, that is after white space."""
    return torch.tensor([text[:1].isspace() for text in texts])


def lines(texts: list[str]) -> Tensor:
    """`[N]` bool: whether a token is the first of a line."""
    return torch.tensor([False, *("\n" in text for text in texts[:-1])])


def spans(reading: Reading, replay: Replay, budget: int, always: Tensor) -> Iterator[Named]:
    """The default beside other ways to hand scores on, each with equal shares and by score."""
    raw = windows(reading, replay)[32, "max", "sum"]
    texts = once("texts", lambda: _texts(replay.tokenizer, reading.ids))
    one = torch.ones(reading.tokens)
    word, line, sentence = words(texts), lines(texts), begun(replay, reading)
    apart = torch.where(word, 1.0, 1 / UNIT)

    def dealt(name: str, scores: Tensor) -> Iterator[Named]:
        yield name, choose.uniform(scores, budget, always)
        yield f"{name}, by score", choose.by_score(scores, budget, always)

    yield from dealt("uncomp", by_words(raw, reading, replay))
    yield from dealt("tokens 8+16", both(raw, 8, 16))
    yield from dealt("tokens 8+16 inside lines", spaced(raw, cut(one, line), 8, 16))
    for before, after in ((4, 8), (8, 16), (8, 32), (16, 32), (64, 64)):
        inside = spaced(raw, cut(one, sentence), before, after)
        yield from dealt(f"tokens {before}+{after} inside sentences", inside)
    yield from dealt("tokens 8+16, sentences 16 apart", spaced(raw, one + 16.0 * sentence, 8, 16))
    for before, after in ((1, 2), (2, 4), (4, 8)):
        yield from dealt(f"words {before}+{after}", spaced(raw, apart, before, after))
        inside = spaced(raw, cut(apart, sentence), before, after)
        yield from dealt(f"words {before}+{after} inside sentences", inside)
        equal = spaced(raw, cut(word.float(), sentence), before, after)
        yield from dealt(f"words {before}+{after} inside sentences, all tokens alike", equal)
    yield from dealt("snapkv", choose.spread(windows(reading, replay)[8, "sum", "sum"], 7, 7))


def begun(replay: Replay, reading: Reading) -> Tensor:
    """`[N]` bool: whether a token is the first of a line or of a sentence, as in the engine."""
    gaps = once("gaps", lambda: vocabulary(replay.tokenizer).gaps(reading.ids))
    return torch.from_numpy(gaps) == SENTENCE


def cut(gaps: Tensor, starts: Tensor) -> Tensor:
    """Distances to the token before, infinite where something new begins."""
    return gaps.masked_fill(starts, torch.inf)


def spaced(raw: Tensor, gaps: Tensor, before: float, after: float) -> Tensor:
    """Scores handed on, falling by e every `after` units on and every `before` units back.

    Args:
        raw: `[..., N]`.
        gaps: `[N]`, distance of every token to the one before it; 0: the same place.
    """
    ahead = _running(raw, torch.exp(-gaps / after))
    back = _running(raw.flip(-1), torch.exp(-F.pad(gaps[1:], (0, 1)) / before).flip(-1))
    return ahead + back.flip(-1) - raw


def _running(raw: Tensor, factors: Tensor) -> Tensor:
    """out[j] = raw[j] + factors[j] * out[j - 1], by doubling."""
    out = raw
    for turn in range(math.ceil(math.log2(raw.shape[-1]))):
        step = 1 << turn
        out = out + factors * F.pad(out, (step, 0))[..., : raw.shape[-1]]
        factors = factors * F.pad(factors, (step, 0))[..., : raw.shape[-1]]
    return out


def _texts(tokenizer: Any, ids: tuple[int, ...]) -> list[str]:
    known = {token: tokenizer.decode([token]) for token in set(ids)}
    return [known[token] for token in ids]
