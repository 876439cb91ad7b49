"""How long the device worked on compactions, without waiting for it."""

from __future__ import annotations

import time

import torch


class DeviceClock:
    """Adds up intervals once the device has passed them.

    Args:
        device: CUDA events are used where there are any, host time elsewhere.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._open: list[tuple[object, object, object]] = []

    def mark(self) -> object:
        """The present point of the device's work."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, start: object, scored: object, moved: object) -> None:
        """A compaction was scored between the first two marks and moved between the last two."""
        self._open.append((start, scored, moved))

    def collect(self) -> tuple[float, float]:
        """Seconds of scoring and of moving in intervals that have ended since the last call."""
        score = move = 0.0
        waiting = []
        for start, scored, moved in self._open:
            if not self._cuda:
                score += scored - start  # type: ignore[operator]
                move += moved - scored  # type: ignore[operator]
            elif moved.query():  # type: ignore[attr-defined]
                score += start.elapsed_time(scored) / 1e3  # type: ignore[attr-defined]
                move += scored.elapsed_time(moved) / 1e3  # type: ignore[attr-defined]
            else:
                waiting.append((start, scored, moved))
        self._open = waiting
        return score, move
