"""Variants for prompts that are compressed before their question is known."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from uncomp.eval.ablation import choose, features
from uncomp.eval.ablation.replay import Reading, Replay
from uncomp.eval.ablation.shared import (
    Named,
    both,
    entropy,
    once,
    ranked,
    unrotated,
    value_norm,
    windows,
)


def agnostic(reading: Reading, replay: Replay, budget: int, always: Tensor) -> Iterator[Named]:
    """Compressed before the question is known: whose queries, and what without queries."""
    w = windows(reading, replay)
    norm = value_norm(reading)
    scale = replay.scale

    def probed(count: int, over: str) -> Tensor:
        made: Tensor = once(
            ("probes", count, over), lambda: features.probes(reading, scale, count, over, 32)
        )
        return made

    def moved(over: str) -> Tensor:
        made: Tensor = once(
            ("moved", over),
            lambda: features.moved_probes(reading, scale, 256, replay.rotate, 64, over),
        )
        return made

    def even(scores: Tensor) -> Tensor:
        return choose.uniform(scores, budget, always)

    yield "snapkv", even(choose.spread(w[8, "sum", "sum"], 7, 7))
    for width, over in ((8, "sum"), (64, "sum"), (64, "max")):
        yield f"w{width}.{over}.ema16", even(choose.trail(w[width, over, "sum"], 16, "sum"))
    for count in (64, 256):
        for over in ("sum", "max"):
            raw = probed(count, over)
            yield f"probes{count}.{over}", even(raw)
            yield f"probes{count}.{over}.ema8", even(choose.trail(raw, 8, "sum"))
            if count == 256:
                yield f"probes{count}.{over}.max3", even(choose.spread(raw, 1, 1))
                yield f"probes{count}.{over}.adakv", choose.by_score(raw, budget, always)
                yield f"probes{count}.{over}.vnorm", even(raw * norm)
    for over in ("sum", "max"):
        raw = moved(over)
        yield f"moved.{over}", even(raw)
        yield f"moved.{over}.vnorm", even(raw * norm)
        yield f"moved.{over}.ema8", even(choose.trail(raw, 8, "sum"))
        yield f"moved.{over}.adakv", choose.by_score(raw * norm, budget, always)
    difference = once("difference", lambda: features.key_difference(reading))
    yield "keydiff", even(difference)
    yield "keydiff.vnorm", even(difference * norm)
    yield "keydiff.max7", even(choose.spread(difference, 3, 3))
    yield "keydiff.avg7", even(choose.spread(difference, 3, 3, "avg"))
    yield "keydiff.layers", choose.over_layers(difference, budget, always, 0.5)
    again = once("again", lambda: replay.reread(reading, repeated(reading, replay)))
    yield "reread", even(again)
    yield "reread.adakv", choose.by_score(again, budget, always)
    yield "reread.layers", choose.over_layers(again, budget, always, 0.2)
    h = entropy(reading, "renormalized")
    yield "keydiff.entropy2", choose.by_weight(difference, budget, always, ranked(h, 2))
    yield "reread.entropy2", choose.by_weight(again, budget, always, ranked(h, 2))
    yield "reread.entropy2.rev", choose.by_weight(again, budget, always, ranked(h, 2, True))
    noise = torch.rand(norm.shape, generator=torch.Generator().manual_seed(0))
    yield "random", even(noise)
    yield "streaming", even(torch.arange(norm.shape[-1]).float().expand(norm.shape).contiguous())


def blind(reading: Reading, replay: Replay, budget: int, always: Tensor) -> Iterator[Named]:
    """Before the question is known, second look: what stands out, and how it is pooled."""
    w = windows(reading, replay)
    norm = value_norm(reading)
    attention = choose.trail(w[32, "max", "sum"], 24, "sum")
    difference = once("difference", lambda: features.key_difference(reading))

    plain = unrotated(reading, replay)
    values = once("values", lambda: features.difference(reading.values))
    again = once("again", lambda: replay.reread(reading, repeated(reading, replay)))

    def even(scores: Tensor) -> Tensor:
        return choose.uniform(scores, budget, always)

    def average(scores: Tensor, width: int) -> Tensor:
        return choose.spread(scores, width // 2, width // 2, "avg")

    yield "attention.ada", choose.by_score(attention, budget, always)
    yield "keydiff", even(difference)
    yield "plain", even(plain)
    yield "values", even(values)
    for name, scores in (("keydiff", difference), ("plain", plain)):
        for width in (5, 9, 15):
            yield f"{name}.avg{width}", even(average(scores, width))
        yield f"{name}.vnorm.avg7", even(average(scores * norm, 7))
        yield f"{name}.values.avg7", even(average(scores + values, 7))
        yield f"{name}.avg7.ada", choose.by_score(average(scores, 7), budget, always)
        yield f"{name}.avg7.layers", choose.over_layers(average(scores, 7), budget, always, 0.5)
    yield "keydiff.trail8", even(choose.trail(difference, 8, "sum"))
    for share in (0.25, 0.5):
        mixed = share * choose.unit(attention) + (1 - share) * choose.unit(average(difference, 7))
        yield f"mixed{share}", even(mixed)
    yield "reread", even(again)
    yield "reread.ada", choose.by_score(again, budget, always)
    yield "reread.layers", choose.over_layers(again, budget, always, 0.2)
    h = entropy(reading, "renormalized")
    best = average(difference, 7)
    yield "keydiff.entropy2", choose.by_weight(best, budget, always, ranked(h, 2))
    yield "keydiff.entropy2.rev", choose.by_weight(best, budget, always, ranked(h, 2, True))
    yield "random", even(torch.rand(norm.shape, generator=torch.Generator().manual_seed(0)))
    yield "streaming", even(torch.arange(norm.shape[-1]).float().expand(norm.shape).contiguous())


def outlines(reading: Reading, replay: Replay, budget: int, always: Tensor) -> Iterator[Named]:
    """Before the question is known, third look: pooling of what stands out before RoPE."""
    plain = unrotated(reading, replay)

    def even(scores: Tensor) -> Tensor:
        return choose.uniform(scores, budget, always)

    yield "plain.avg9", even(choose.spread(plain, 4, 4, "avg"))
    yield "plain.max9", even(choose.spread(plain, 4, 4))
    for length in (2, 4, 8, 16):
        scores = both(plain, max(1.0, length / 2), length)
        yield f"plain.ema{length}", even(scores)
        yield f"plain.ema{length}.ada", choose.by_score(scores, budget, always)


def repeated(reading: Reading, replay: Replay) -> list[int]:
    ask = replay.tokenizer.encode(
        "\n\nRepeat the previous context exactly.\n\n", add_special_tokens=False
    )
    return [*ask, *reading.ids]
