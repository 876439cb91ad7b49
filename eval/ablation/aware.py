"""Variants for prompts whose question is in the window, in the order in which they were tried."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from uncomp.eval.ablation import choose, features
from uncomp.eval.ablation.replay import Reading, Replay
from uncomp.eval.ablation.shared import (
    Named,
    both,
    by_words,
    entropy,
    once,
    ranked,
    unrotated,
    value_norm,
    windows,
)


def screen(reading: Reading, replay: Replay, budget: int, always: Tensor) -> Iterator[Named]:
    """First look: windows, pooling, agreement, allocation."""
    w = windows(reading, replay)
    base = w[8, "sum", "sum"]
    pool15 = choose.spread(base, 7, 7)
    ahead = choose.spread(base, 0, 15)
    norm = value_norm(reading)
    h = entropy(reading, "renormalized")

    def even(scores: Tensor) -> Tensor:
        return choose.uniform(scores, budget, always)

    yield "snapkv", even(pool15)
    for width in (16, 32, 64):
        yield f"w{width}", even(choose.spread(w[width, "sum", "sum"], 7, 7))
        yield f"w{width}.0+15", even(choose.spread(w[width, "sum", "sum"], 0, 15))
    for width in (8, 16, 32):
        yield f"w{width}.max.0+15", even(choose.spread(w[width, "max", "sum"], 0, 15))
    yield "groupmax.0+15", even(choose.spread(w[8, "sum", "max"], 0, 15))
    for back, forward in (
        (3, 3),
        (15, 15),
        (0, 7),
        (0, 15),
        (0, 23),
        (0, 31),
        (2, 16),
        (4, 24),
        (8, 24),
    ):
        yield f"pool-{back}+{forward}", even(choose.spread(base, back, forward))
    yield "avg-0+15", even(choose.spread(base, 0, 15, "avg"))
    yield "avg-0+31", even(choose.spread(base, 0, 31, "avg"))
    for share in (0.25, 0.5, 1.0):
        yield f"agree{share}.layer", even(choose.agree(ahead, share, over="layer"))
        yield f"agree{share}.all", even(choose.agree(ahead, share))
    yield "agree0.5.all.max", even(choose.agree(ahead, 0.5, how="max"))
    yield "vnorm.0+15", even(choose.spread(base * norm, 0, 15))
    yield "adakv", choose.by_score(pool15, budget, always)
    yield "adakv.0+15", choose.by_score(ahead, budget, always)
    yield "adakv.0+15.f5", choose.by_score(ahead, budget, always, 0.5)
    yield "adakv.layers", choose.over_layers(ahead, budget, always, 0.5)
    yield "entropy2", choose.by_weight(pool15, budget, always, ranked(h, 2))
    yield "entropy2.0+15", choose.by_weight(ahead, budget, always, ranked(h, 2))
    yield "entropy2.0+15.rev", choose.by_weight(ahead, budget, always, ranked(h, 2, True))
    noise = torch.rand(base.shape, generator=torch.Generator().manual_seed(0))
    yield "random", even(noise)


def pooling(reading: Reading, replay: Replay, budget: int, always: Tensor) -> Iterator[Named]:
    """Second look: how a score spreads to the tokens after it, by window."""
    w = windows(reading, replay)
    norm = value_norm(reading)
    h = entropy(reading, "renormalized")

    def even(scores: Tensor) -> Tensor:
        return choose.uniform(scores, budget, always)

    yield "snapkv", even(choose.spread(w[8, "sum", "sum"], 7, 7))
    for width, over in ((8, "sum"), (16, "sum"), (32, "sum"), (32, "max"), (64, "max")):
        raw = w[width, over, "sum"]
        name = f"w{width}.{over}"
        yield f"{name}.max0+31", even(choose.spread(raw, 0, 31))
        yield f"{name}.avg0+31", even(choose.spread(raw, 0, 31, "avg"))
        yield f"{name}.avg0+47", even(choose.spread(raw, 0, 47, "avg"))
        yield f"{name}.avg4+44", even(choose.spread(raw, 4, 44, "avg"))
        yield f"{name}.trail24", even(choose.trail(raw, 24))
        yield f"{name}.ema24", even(choose.trail(raw, 24, "sum"))
    raw = w[32, "max", "sum"]
    best = choose.spread(raw, 0, 31, "avg")
    yield "groupmax", even(choose.spread(w[32, "max", "max"], 0, 31, "avg"))
    yield "vnorm", even(choose.spread(raw * norm, 0, 31, "avg"))
    yield "agree0.5.layer", even(choose.agree(best, 0.5, over="layer"))
    yield "agree0.5.all", even(choose.agree(best, 0.5))
    yield "adakv", choose.by_score(best, budget, always)
    yield "adakv.f5", choose.by_score(best, budget, always, 0.5)
    yield "adakv.layers.f5", choose.over_layers(best, budget, always, 0.5)
    yield "entropy2", choose.by_weight(best, budget, always, ranked(h, 2))
    yield "entropy2.rev", choose.by_weight(best, budget, always, ranked(h, 2, True))


def dealing(reading: Reading, replay: Replay, budget: int, always: Tensor) -> Iterator[Named]:
    """Third look: the best scores, and how a layer's tokens are dealt to its heads."""
    w = windows(reading, replay)
    norm = value_norm(reading)
    raw = w[32, "max", "sum"]
    best = choose.trail(raw, 24, "sum")
    yield "snapkv", choose.uniform(choose.spread(w[8, "sum", "sum"], 7, 7), budget, always)
    yield "uniform", choose.uniform(best, budget, always)
    yield "ema12", choose.uniform(choose.trail(raw, 12, "sum"), budget, always)
    yield "ema16.ada", choose.by_score(choose.trail(raw, 16, "sum"), budget, always)
    for floor in (0.0, 0.2, 0.5):
        yield f"ada{floor}", choose.by_score(best, budget, always, floor)
    yield "ema32.ada", choose.by_score(choose.trail(raw, 32, "sum"), budget, always)
    yield "vnorm.ada", choose.by_score(choose.trail(raw * norm, 24, "sum"), budget, always)
    yield (
        "groupmax.ada",
        choose.by_score(choose.trail(w[32, "max", "max"], 24, "sum"), budget, always),
    )
    yield "w64.ada", choose.by_score(choose.trail(w[64, "max", "sum"], 24, "sum"), budget, always)
    yield "w16.ada", choose.by_score(choose.trail(w[16, "max", "sum"], 24, "sum"), budget, always)
    yield "sum.ada", choose.by_score(choose.trail(w[32, "sum", "sum"], 24, "sum"), budget, always)
    yield "w8.ada", choose.by_score(choose.trail(w[8, "sum", "sum"], 24, "sum"), budget, always)
    yield "layers0.5", choose.over_layers(best, budget, always, 0.5)
    yield "agree.ada", choose.by_score(choose.agree(best, 0.5, over="layer"), budget, always)
    for measure in ("renormalized", "raw", "full"):
        h = entropy(reading, measure)
        yield f"entropy-{measure}", choose.by_weight(best, budget, always, ranked(h, 2))
        yield f"entropy-{measure}.rev", choose.by_weight(best, budget, always, ranked(h, 2, True))
        prior = ranked(h, 1.5)[:, :, None].float()
        yield f"prior-{measure}", choose.by_score(best * prior, budget, always)
        prior = ranked(h, 1.5, True)[:, :, None].float()
        yield f"prior-{measure}.rev", choose.by_score(best * prior, budget, always)
    chance = torch.rand(raw.shape[:2], generator=torch.Generator().manual_seed(1))
    yield "random-heads", choose.by_weight(best, budget, always, ranked(chance, 2))


def sides(reading: Reading, replay: Replay, budget: int, always: Tensor) -> Iterator[Named]:
    """Fourth look: how far a score reaches after a token, and before it."""
    w = windows(reading, replay)
    norm = value_norm(reading)
    raw = w[32, "max", "sum"]

    yield "snapkv", choose.uniform(choose.spread(w[8, "sum", "sum"], 7, 7), budget, always)
    yield "snapkv.ada", choose.by_score(choose.spread(w[8, "sum", "sum"], 7, 7), budget, always)
    for before, after in (
        (0, 16),
        (0, 24),
        (4, 24),
        (8, 24),
        (16, 16),
        (4, 12),
        (8, 12),
        (8, 16),
        (16, 24),
        (24, 24),
    ):
        yield f"{before}+{after}", choose.by_score(both(raw, before, after), budget, always)
    for before, after in ((0, 16), (8, 16), (16, 16), (8, 24)):
        yield (
            f"max.{before}+{after}",
            choose.by_score(both(raw, before, after, "max"), budget, always),
        )
    for before, after in ((4, 16), (8, 16), (8, 24)):
        yield (
            f"vnorm.{before}+{after}",
            choose.by_score(both(raw * norm, before, after), budget, always),
        )
    yield "w64.8+16", choose.by_score(both(w[64, "max", "sum"], 8, 16), budget, always)
    yield "w16.8+16", choose.by_score(both(w[16, "max", "sum"], 8, 16), budget, always)
    yield "groupmax.8+16", choose.by_score(both(w[32, "max", "max"], 8, 16), budget, always)
    root = w[32, "max", "sum"].sqrt()
    yield "root.8+16", choose.by_score(both(root, 8, 16), budget, always)
    yield "layers.8+16", choose.over_layers(both(raw, 8, 16), budget, always, 0.5)


def mixes(reading: Reading, replay: Replay, budget: int, always: Tensor) -> Iterator[Named]:
    """Fifth look: near and far queries together; trails that take the best or the sum."""
    w = windows(reading, replay)
    faded = once("faded", lambda: features.fading(reading, replay.scale, 32, [8, 16]))

    raws = {
        "w8.sum": w[8, "sum", "sum"],
        "w8.max": w[8, "max", "sum"],
        "w16.sum": w[16, "sum", "sum"],
        "w16.max": w[16, "max", "sum"],
        "w32.max": w[32, "max", "sum"],
        "fade8": faded[8],
        "fade16": faded[16],
        "w8+w32": w[8, "sum", "sum"] + w[32, "max", "sum"],
        "w8mean+w32": w[8, "sum", "sum"] / 8 + w[32, "max", "sum"],
    }
    yield "snapkv", choose.uniform(choose.spread(w[8, "sum", "sum"], 7, 7), budget, always)
    for name, raw in raws.items():
        yield f"{name}.sum8+16", choose.by_score(both(raw, 8, 16, "sum"), budget, always)
        yield f"{name}.sum0+24", choose.by_score(choose.trail(raw, 24, "sum"), budget, always)
        yield f"{name}.max8+24", choose.by_score(both(raw, 8, 24, "max"), budget, always)
        yield f"{name}.pool8+31", choose.by_score(choose.spread(raw, 8, 31), budget, always)
        yield f"{name}.pool7+15", choose.by_score(choose.spread(raw, 7, 15), budget, always)


def alone(reading: Reading, replay: Replay, budget: int, always: Tensor) -> Iterator[Named]:
    """The engine's default and nothing else: for many samples, see `per_prompt`."""
    scores = by_words(windows(reading, replay)[32, "max", "sum"], reading, replay)
    yield "uncomp", choose.uniform(scores, budget, always)


def final(reading: Reading, replay: Replay, budget: int, always: Tensor) -> Iterator[Named]:
    """The engine's default, its parts taken away one by one, controls and baselines."""
    w = windows(reading, replay)
    scores = by_words(w[32, "max", "sum"], reading, replay)
    snapkv = choose.spread(w[8, "sum", "sum"], 7, 7)

    def even(of: Tensor) -> Tensor:
        return choose.uniform(of, budget, always)

    yield "uncomp", even(scores)
    yield "by score", choose.by_score(scores, budget, always)
    yield "window 8", even(by_words(w[8, "max", "sum"], reading, replay))
    yield "window 16", even(by_words(w[16, "max", "sum"], reading, replay))
    yield "window 64", even(by_words(w[64, "max", "sum"], reading, replay))
    yield "sum over window", even(by_words(w[32, "sum", "sum"], reading, replay))
    yield "largest of the group", even(by_words(w[32, "max", "max"], reading, replay))
    yield "by tokens", even(both(w[32, "max", "sum"], 8, 16))
    yield "max-pool 15", even(choose.spread(w[32, "max", "sum"], 7, 7))
    yield "no pooling", even(w[32, "max", "sum"])
    for measure in ("renormalized", "raw", "full"):
        h = entropy(reading, measure)
        yield f"entropy, {measure}", choose.by_weight(scores, budget, always, ranked(h, 2))
        reverse = ranked(h, 2, True)
        yield f"entropy, {measure}, reversed", choose.by_weight(scores, budget, always, reverse)
    h = entropy(reading, "renormalized")
    chance = torch.rand(scores.shape[:2], generator=torch.Generator().manual_seed(1))
    yield "random heads", choose.by_weight(scores, budget, always, ranked(chance, 2))
    prior = ranked(h, 1.5)[:, :, None].float()
    yield "entropy as prior", choose.by_score(scores * prior, budget, always)
    norm = value_norm(reading)
    valued = by_words(w[32, "max", "sum"] * norm, reading, replay)
    yield "value norms", even(valued)
    yield "value norms, by score", choose.by_score(valued, budget, always)
    yield "unequal layers", choose.over_layers(scores, budget, always, 0.5)
    yield "snapkv", even(snapkv)
    yield "adakv", choose.by_score(snapkv, budget, always)
    yield "snapkv-paper", even(choose.spread(w[32, "sum", "sum"], 3, 3))
    plain = both(unrotated(reading, replay), 8, 16)
    yield "key-difference-prerope", even(plain)
    yield "key-difference", even(features.key_difference(reading))
    recent = torch.arange(scores.shape[-1]).float()
    yield "streaming", even(recent.expand(scores.shape).contiguous())
    chance = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0))
    yield "random", even(chance)
