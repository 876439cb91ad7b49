"""Variants in which the heads of all layers share one budget."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from uncomp import importance
from uncomp.eval.ablation import choose
from uncomp.eval.ablation.agnostic import repeated
from uncomp.eval.ablation.replay import Reading, Replay
from uncomp.eval.ablation.shared import Named, both, by_words, once, unrotated, windows
from uncomp.policies.hybrid import Hybrid


def again(reading: Reading, replay: Replay, budget: int, always: Tensor) -> Iterator[Named]:
    """Three scores, and a second reading of the context (KVzip); who shares with whom, and by what.

    Raises:
        ValueError: no ``--calibration``.
    """
    if replay.importance is None:
        raise ValueError("set 'again' needs --calibration FILE (uncomp calibrate)")
    measured = replay.importance
    attention = by_words(windows(reading, replay)[32, "max", "sum"], reading, replay)
    difference = both(unrotated(reading, replay), 8, 16)
    scores = {
        "attention": attention,
        "keys": difference,
        "hybrid": Hybrid().combine([attention, difference], (~always).expand(attention.shape)),
        "reread": once("again", lambda: replay.reread(reading, repeated(reading, replay))),
    }
    least = torch.full(attention.shape[:2], int(always.sum()))
    most = torch.full_like(least, reading.tokens)

    for name, score in scores.items():
        yield name, choose.uniform(score, budget, always)
        if name != "hybrid":  # ranks say nothing about other heads
            yield f"{name}.ada", choose.by_score(score, budget, always)
            yield f"{name}.layers", choose.over_layers(score, budget, always, 0.1)
        for floor in (0.0, 0.2, 0.4):
            counts = importance.deal(measured, budget * least.numel(), least, most, floor)
            yield f"{name}.layers-calibrated{floor}", choose.ragged(score, counts, always)
