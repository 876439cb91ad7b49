"""Lists of named variants: how tokens are scored and how they are dealt to heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from uncomp.eval.ablation import again, agnostic, aware, choose, robust, spans
from uncomp.eval.ablation.replay import Reading, Replay
from uncomp.eval.ablation.shared import RECENT, SINKS, Named

Make = Callable[[Reading, Replay, int, Tensor], Iterator[Named]]

#: name -> what makes the variants at one budget
SETS: dict[str, Make] = {
    made.__name__: made
    for made in (
        aware.final,
        aware.alone,
        aware.screen,
        aware.pooling,
        aware.dealing,
        aware.sides,
        aware.mixes,
        agnostic.agnostic,
        agnostic.blind,
        agnostic.outlines,
        robust.robust,
        again.again,
        spans.spans,
    )
}


def masks(name: str, reading: Reading, replay: Replay, keep: float) -> Iterator[Named]:
    """All variants of a list at one keep ratio."""
    always = choose.forced(reading.tokens, SINKS, RECENT)
    yield from SETS[name](reading, replay, round(keep * reading.tokens), always)
