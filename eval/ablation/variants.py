"""Named variants of how tokens are scored and dealt to heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from uncomp.eval.ablation import choose, features
from uncomp.eval.ablation.replay import Reading, Replay
from uncomp.kernels.entropy import spectrum, truncated_entropy
from uncomp.kernels.gram import gram

SINKS = 4
RECENT = 8

#: name and what each head keeps, `[L, H, N]`
Named = tuple[str, Tensor]

#: computed once per reading
_memo: dict[Any, Any] = {}


def forget() -> None:
    _memo.clear()


def _once(key: Any, make: Callable[[], Any]) -> Any:
    if key not in _memo:
        _memo[key] = make()
    return _memo[key]


def entropy(reading: Reading, measure: str) -> Tensor:
    layers, heads, tokens, _ = reading.keys.shape
    keys = reading.keys[:, :, :: max(1, tokens // 1024)].flatten(0, 1)
    counts = torch.full((layers * heads,), keys.shape[1])
    values = spectrum(gram(keys, counts).covariance(), torch.float32)
    return truncated_entropy(values, None, measure).view(layers, heads)


def ranked(values: Tensor, ratio: float, reverse: bool = False) -> Tensor:
    """Weights linear in the rank within the layer, top / bottom = ratio."""
    rank = values.argsort(-1).argsort(-1).double()
    if reverse:
        rank = values.shape[-1] - 1 - rank
    return 1 + (ratio - 1) * rank / max(1, values.shape[-1] - 1)


def masks(
    name: str, reading: Reading, replay: Replay, keep: float, agnostic: bool
) -> Iterator[tuple[str, Tensor]]:
    """All variants of a list at one keep ratio: what each keeps, `[L, H, N]`."""
    tokens = reading.tokens
    budget = round(keep * tokens)
    always = choose.forced(tokens, SINKS, RECENT)
    yield from SETS[name](reading, replay, budget, always)


def _windows(reading: Reading, replay: Replay) -> dict:
    return _once("windows", lambda: features.windows(reading, replay.scale, [8, 16, 32, 64]))


def screen(reading: Reading, replay: Replay, budget: int, always: Tensor):
    """First look: windows, pooling, agreement, allocation."""
    w = _windows(reading, replay)
    base = w[8, "sum", "sum"]
    pool15 = choose.spread(base, 7, 7)
    ahead = choose.spread(base, 0, 15)
    norm = _once("vnorm", lambda: features.value_norm(reading))
    h = _once("entropy", lambda: entropy(reading, "renormalized"))

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


def pooling(reading: Reading, replay: Replay, budget: int, always: Tensor):
    """Second look: how a score spreads to the tokens after it, by window."""
    w = _windows(reading, replay)
    norm = _once("vnorm", lambda: features.value_norm(reading))
    h = _once("entropy", lambda: entropy(reading, "renormalized"))

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


def dealing(reading: Reading, replay: Replay, budget: int, always: Tensor):
    """Third look: the best scores, and how a layer's tokens are dealt to its heads."""
    w = _windows(reading, replay)
    norm = _once("vnorm", lambda: features.value_norm(reading))
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
        h = _once(measure, lambda m=measure: entropy(reading, m))
        yield f"entropy-{measure}", choose.by_weight(best, budget, always, ranked(h, 2))
        yield f"entropy-{measure}.rev", choose.by_weight(best, budget, always, ranked(h, 2, True))
        prior = ranked(h, 1.5)[:, :, None].float()
        yield f"prior-{measure}", choose.by_score(best * prior, budget, always)
        prior = ranked(h, 1.5, True)[:, :, None].float()
        yield f"prior-{measure}.rev", choose.by_score(best * prior, budget, always)
    chance = torch.rand(raw.shape[:2], generator=torch.Generator().manual_seed(1))
    yield "random-heads", choose.by_weight(best, budget, always, ranked(chance, 2))


def sides(reading: Reading, replay: Replay, budget: int, always: Tensor):
    """Fourth look: how far a score reaches after a token, and before it."""
    w = _windows(reading, replay)
    norm = _once("vnorm", lambda: features.value_norm(reading))
    raw = w[32, "max", "sum"]

    def both(scores: Tensor, before: int, after: int, kind: str = "sum") -> Tensor:
        ahead = choose.trail(scores, after, kind)
        if not before:
            return ahead
        behind = choose.trail(scores.flip(-1), before, kind).flip(-1)
        return ahead + behind - scores if kind == "sum" else torch.maximum(ahead, behind)

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


def mixes(reading: Reading, replay: Replay, budget: int, always: Tensor):
    """Fifth look: near and far queries together; trails that take the best or the sum."""
    w = _windows(reading, replay)
    faded = _once("faded", lambda: features.fading(reading, replay.scale, 32, [8, 16]))

    def both(scores: Tensor, before: int, after: int, kind: str) -> Tensor:
        ahead = choose.trail(scores, after, kind)
        behind = choose.trail(scores.flip(-1), before, kind).flip(-1)
        return ahead + behind - scores if kind == "sum" else torch.maximum(ahead, behind)

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


def agnostic(reading: Reading, replay: Replay, budget: int, always: Tensor):
    """Compressed before the question is known: whose queries, and what without queries."""
    w = _windows(reading, replay)
    norm = _once("vnorm", lambda: features.value_norm(reading))
    scale = replay.scale

    def even(scores: Tensor) -> Tensor:
        return choose.uniform(scores, budget, always)

    yield "snapkv", even(choose.spread(w[8, "sum", "sum"], 7, 7))
    for width, over in ((8, "sum"), (64, "sum"), (64, "max")):
        yield f"w{width}.{over}.ema16", even(choose.trail(w[width, over, "sum"], 16, "sum"))
    for count in (64, 256):
        for over in ("sum", "max"):
            raw = _once(
                ("probes", count, over),
                lambda c=count, o=over: features.probes(reading, scale, c, o, 32),
            )
            yield f"probes{count}.{over}", even(raw)
            yield f"probes{count}.{over}.ema8", even(choose.trail(raw, 8, "sum"))
            if count == 256:
                yield f"probes{count}.{over}.max3", even(choose.spread(raw, 1, 1))
                yield f"probes{count}.{over}.adakv", choose.by_score(raw, budget, always)
                yield f"probes{count}.{over}.vnorm", even(raw * norm)
    for over in ("sum", "max"):
        raw = _once(
            ("moved", over),
            lambda o=over: features.moved_probes(reading, scale, 256, replay.rotate, 64, o),
        )
        yield f"moved.{over}", even(raw)
        yield f"moved.{over}.vnorm", even(raw * norm)
        yield f"moved.{over}.ema8", even(choose.trail(raw, 8, "sum"))
        yield f"moved.{over}.adakv", choose.by_score(raw * norm, budget, always)
    difference = _once("difference", lambda: features.key_difference(reading))
    yield "keydiff", even(difference)
    yield "keydiff.vnorm", even(difference * norm)
    yield "keydiff.max7", even(choose.spread(difference, 3, 3))
    yield "keydiff.avg7", even(choose.spread(difference, 3, 3, "avg"))
    yield "keydiff.layers", choose.over_layers(difference, budget, always, 0.5)
    again = _once("again", lambda: replay.reread(reading, _repeat(reading, replay)))
    yield "reread", even(again)
    yield "reread.adakv", choose.by_score(again, budget, always)
    yield "reread.layers", choose.over_layers(again, budget, always, 0.2)
    h = _once("entropy", lambda: entropy(reading, "renormalized"))
    yield "keydiff.entropy2", choose.by_weight(difference, budget, always, ranked(h, 2))
    yield "reread.entropy2", choose.by_weight(again, budget, always, ranked(h, 2))
    yield "reread.entropy2.rev", choose.by_weight(again, budget, always, ranked(h, 2, True))
    noise = torch.rand(norm.shape, generator=torch.Generator().manual_seed(0))
    yield "random", even(noise)
    yield "streaming", even(torch.arange(norm.shape[-1]).float().expand(norm.shape).contiguous())


def blind(reading: Reading, replay: Replay, budget: int, always: Tensor):
    """Before the question is known, second look: what stands out, and how it is pooled."""
    w = _windows(reading, replay)
    norm = _once("vnorm", lambda: features.value_norm(reading))
    attention = choose.trail(w[32, "max", "sum"], 24, "sum")
    difference = _once("difference", lambda: features.key_difference(reading))

    def plain() -> Tensor:
        back = -torch.arange(reading.tokens)
        keys = replay.rotate(reading.keys, back)
        return features.difference(keys)

    unrotated = _once("unrotated", plain)
    values = _once("values", lambda: features.difference(reading.values))
    again = _once("again", lambda: replay.reread(reading, _repeat(reading, replay)))

    def even(scores: Tensor) -> Tensor:
        return choose.uniform(scores, budget, always)

    def average(scores: Tensor, width: int) -> Tensor:
        return choose.spread(scores, width // 2, width // 2, "avg")

    yield "attention.ada", choose.by_score(attention, budget, always)
    yield "keydiff", even(difference)
    yield "plain", even(unrotated)
    yield "values", even(values)
    for name, scores in (("keydiff", difference), ("plain", unrotated)):
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
    h = _once("entropy", lambda: entropy(reading, "renormalized"))
    best = average(difference, 7)
    yield "keydiff.entropy2", choose.by_weight(best, budget, always, ranked(h, 2))
    yield "keydiff.entropy2.rev", choose.by_weight(best, budget, always, ranked(h, 2, True))
    yield "random", even(torch.rand(norm.shape, generator=torch.Generator().manual_seed(0)))
    yield "streaming", even(torch.arange(norm.shape[-1]).float().expand(norm.shape).contiguous())


def _repeat(reading: Reading, replay: Replay) -> list[int]:
    ask = replay.tokenizer.encode(
        "\n\nRepeat the previous context exactly.\n\n", add_special_tokens=False
    )
    return [*ask, *reading.ids]


def outlines(reading: Reading, replay: Replay, budget: int, always: Tensor) -> Iterator[Named]:
    """Before the question is known, third look: pooling of what stands out before RoPE."""
    back = -torch.arange(reading.tokens)
    unrotated = _once("unrotated", lambda: features.difference(replay.rotate(reading.keys, back)))

    def both(scores: Tensor, length: int) -> Tensor:
        behind = choose.trail(scores.flip(-1), max(1.0, length / 2), "sum").flip(-1)
        return choose.trail(scores, length, "sum") + behind - scores

    def even(scores: Tensor) -> Tensor:
        return choose.uniform(scores, budget, always)

    yield "plain.avg9", even(choose.spread(unrotated, 4, 4, "avg"))
    yield "plain.max9", even(choose.spread(unrotated, 4, 4))
    for length in (2, 4, 8, 16):
        yield f"plain.ema{length}", even(both(unrotated, length))
        yield f"plain.ema{length}.ada", choose.by_score(both(unrotated, length), budget, always)


SETS: dict[str, Callable] = {
    "screen": screen,
    "pooling": pooling,
    "dealing": dealing,
    "agnostic": agnostic,
    "blind": blind,
    "sides": sides,
    "mixes": mixes,
    "outlines": outlines,
}
