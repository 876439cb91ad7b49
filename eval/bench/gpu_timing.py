"""Times of work on a device, and facts about it."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
import triton

from uncomp.eval.bench.rows import Row, judge, machine

NAME = "gpu"
#: bytes written between repetitions, several times the largest L2
FLUSH = 512 << 20
Work = Callable[[], object]


class Timer:
    """Times work on a device; several sides take turns, so that drift meets all of them.

    Args:
        device: CUDA, or the CPU for dry runs.
        repeats: timed runs of each side.
        warm: runs before them.
    """

    def __init__(self, device: torch.device, repeats: int, warm: int) -> None:
        self.device, self.repeats, self.warm = device, repeats, warm
        self.cuda = device.type == "cuda"
        self._flush = torch.empty(FLUSH if self.cuda else 0, dtype=torch.uint8, device=device)

    def times(self, **sides: Work) -> dict[str, list[float]]:
        """Seconds of every repetition by side; nothing of a repetition is left in the L2."""
        return self.prepared({name: (work, _nothing) for name, work in sides.items()})

    def prepared(self, sides: dict[str, tuple[Work, Work]]) -> dict[str, list[float]]:
        """The same for pairs (work, what goes before it and is not timed)."""
        for work, before in sides.values():
            for _ in range(self.warm):
                before()
                work()
        taken: dict[str, list[Any]] = {name: [] for name in sides}
        self.wait()
        for _ in range(self.repeats):
            for name, (work, before) in sides.items():
                before()
                # Also gives the host time to launch the work before the device comes to it.
                self._flush.zero_()
                start = self._mark()
                work()
                taken[name].append((start, self._mark()))
        self.wait()
        return {name: [self._between(*pair) for pair in pairs] for name, pairs in taken.items()}

    def host(self, work: Work, before: Work) -> list[float]:
        """Seconds until the call returns, whatever the device still has to do."""
        seconds = []
        for _ in range(self.repeats):
            before()
            self.wait()
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return seconds

    def graph(self, work: Work) -> Work:
        """Work as one CUDA graph: launches cost no host time. On the CPU the work itself."""
        if not self.cuda:
            return work
        work()  # compiles kernels, which a capture cannot
        self.wait()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            work()
        return captured.replay

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self.cuda else end - start


def median(seconds: list[float]) -> float:
    return statistics.median(seconds)


def row(
    setting: str,
    metric: str,
    unit: str,
    values: list[float],
    least: float | None = None,
    most: float | None = None,
) -> Row:
    """A row of this benchmark: median, 10 % and 90 % quantiles."""
    return judge(NAME, setting, metric, unit, values, least, most, parts=10)


def micros(setting: str, metric: str, seconds: list[float]) -> Row:
    return row(setting, metric, "µs", [1e6 * s for s in seconds])


def facts(commit: str | None = None) -> dict[str, str]:
    """The machine, the versions, and which quantiles low and high are.

    Args:
        commit: of a copy without a repository.
    """
    found = machine()
    found["commit"] = commit or found["commit"]
    device = driver = ""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        driver = _driver()
    return {
        "quantiles": "10-90",
        "gpu": device,
        "driver": driver,
        "cuda": torch.version.cuda or "",
        **found,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.split("\n")[0].strip()


def _nothing() -> None:
    pass
