"""Spans: scores that are handed on inside a sentence or from word to word, not by tokens alone.

A number, a UUID or a long name is many tokens of one word, and how many depends on the tokenizer;
its digits after the first are what a compressed cache loses. And what is found in a sentence says
little about the next one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uncomp.eval.ablation import choose
from uncomp.eval.ablation.replay import Reading, Replay
from uncomp.eval.ablation.shared import Named, both, entropy, once, ranked, value_norm, windows
from uncomp.spans import SENTENCE, Vocabulary


def words(texts: list[str]) -> Tensor:
    """`[N]` bool: whether a token begins a word, that is after white space."""
    return torch.tensor([text[:1].isspace() for text in texts])


def lines(texts: list[str]) -> Tensor:
    """`[N]` bool: whether a token is the first of a line."""
    return torch.tensor([False, *("\n" in text for text in texts[:-1])])


def spans(reading: Reading, replay: Replay, budget: int, always: Tensor) -> Iterator[Named]:
    """The default beside scores that know words and sentences; shares of heads; norms of values."""
    raw = windows(reading, replay)[32, "max", "sum"]
    texts = once("texts", lambda: _texts(replay.tokenizer, reading.ids))
    one = torch.ones(reading.tokens)
    word, line, sentence = words(texts), lines(texts), begun(replay, reading)
    scores = both(raw, 8, 16)

    def even(of: Tensor) -> Tensor:
        return choose.uniform(of, budget, always)

    yield "uncomp", even(scores)
    yield "by-score", choose.by_score(scores, budget, always)
    yield "inside lines", even(spaced(raw, cut(one, line), 8, 16))
    for before, after in ((4, 8), (8, 16), (8, 32), (16, 32), (64, 64)):
        inside = spaced(raw, cut(one, sentence), before, after)
        name = f"inside sentences {before}+{after}"
        yield name, even(inside)
        yield f"{name}, by score", choose.by_score(inside, budget, always)
    for gap in (8.0, 16.0):
        apart = one + gap * sentence
        yield f"sentences {gap:.0f} apart", even(spaced(raw, apart, 8, 16))
    for before, after in ((1, 2), (2, 4), (4, 8)):
        by_word = spaced(raw, word.float(), before, after)
        yield f"words {before}+{after}", even(by_word)
        yield f"words {before}+{after}, by score", choose.by_score(by_word, budget, always)
        by_word = spaced(raw, cut(word.float(), sentence), before, after)
        name = f"words {before}+{after} inside sentences"
        yield name, even(by_word)
        yield f"{name}, by score", choose.by_score(by_word, budget, always)
    valued = raw * value_norm(reading)
    yield "value norms", even(both(valued, 8, 16))
    inside = spaced(valued, cut(one, sentence), 8, 16)
    yield "value norms inside sentences", even(inside)
    yield "value norms inside sentences, by score", choose.by_score(inside, budget, always)
    wide = windows(reading, replay)[64, "max", "sum"]
    yield "window 64 inside sentences", even(spaced(wide, cut(one, sentence), 8, 16))
    inside = spaced(raw, cut(one, sentence), 8, 16)
    for measure in ("renormalized", "raw", "full"):
        h = entropy(reading, measure)
        yield f"entropy {measure}", choose.by_weight(inside, budget, always, ranked(h, 2))
        reverse = ranked(h, 2, True)
        yield f"entropy {measure}, reversed", choose.by_weight(inside, budget, always, reverse)
    chance = torch.rand(raw.shape[:2], generator=torch.Generator().manual_seed(1))
    yield "random heads", choose.by_weight(inside, budget, always, ranked(chance, 2))
    yield "snapkv", even(choose.spread(windows(reading, replay)[8, "sum", "sum"], 7, 7))


def begun(replay: Replay, reading: Reading) -> Tensor:
    """`[N]` bool: whether a token is the first of a line or of a sentence, as in the engine."""
    gaps = once("gaps", lambda: _vocabulary(replay.tokenizer).gaps(reading.ids))
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


@functools.cache
def _vocabulary(tokenizer: Any) -> Vocabulary:
    return Vocabulary.of(tokenizer)


def _texts(tokenizer: Any, ids: tuple[int, ...]) -> list[str]:
    known = {token: tokenizer.decode([token]) for token in set(ids)}
    return [known[token] for token in ids]
