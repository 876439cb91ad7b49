"""How long a device worked on something, without waiting for it."""

from __future__ import annotations

import time
from itertools import pairwise

import torch


class DeviceClock:
    """Adds up intervals once the device has passed them.

    Args:
        device: CUDA events are used where there are any, host time elsewhere.
        parts: intervals that follow each other and are added up apart.
    """

    def __init__(self, device: torch.device, parts: int) -> None:
        self._cuda, self._parts = device.type == "cuda", parts
        self._open: list[tuple[object, ...]] = []

    def mark(self) -> object:
        """The present point of the device's work."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, *marks: object) -> None:
        """The parts of one piece of work lie between these marks: one more than there are parts."""
        if len(marks) != self._parts + 1:
            raise ValueError(f"DeviceClock.add: {len(marks)} marks, need {self._parts + 1}")
        self._open.append(marks)

    def collect(self) -> tuple[float, ...]:
        """Seconds of every part, of what has ended since the last call."""
        sums = [0.0] * self._parts
        waiting = []
        for marks in self._open:
            if self._cuda and not marks[-1].query():  # type: ignore[attr-defined]
                waiting.append(marks)
                continue
            for part, (start, end) in enumerate(pairwise(marks)):
                if self._cuda:
                    sums[part] += start.elapsed_time(end) / 1e3  # type: ignore[attr-defined]
                else:
                    sums[part] += end - start  # type: ignore[operator]
        self._open = waiting
        return tuple(sums)
