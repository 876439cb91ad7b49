"""What a server holds while it works: ``/metrics`` read again and again, and the energy counter."""

from __future__ import annotations

import http.client
import itertools
import re
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from uncomp.eval.bench.serve_energy import Meter
from uncomp.eval.bench.serve_records import Pool

_HELD = "vllm:kv_cache_usage_perc"
_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_PREEMPTIONS = "vllm:num_preemptions_total"
_INFO = "vllm:cache_config_info"
_COMPACTIONS = "uncomp:compactions_total"
_READ = (_HELD, _RUNNING, _WAITING, _PREEMPTIONS, _INFO, _COMPACTIONS)
_FAILURES = (OSError, http.client.HTTPException)


def fetch(url: str, timeout: float = 10.0) -> str:
    """The body of a GET request.

    Raises:
        OSError: no answer, or a status other than 200.
    """
    with urllib.request.urlopen(url, timeout=timeout) as response:
        return response.read().decode()


def read_metrics(text: str) -> tuple[dict[str, float], dict[str, str]]:
    """The values that matter here, and the labels of vLLM's cache configuration.

    With several engines counts are added and the share of the pool in use is averaged.
    """
    # Only the lines that matter: a whole page has a thousand, and this runs beside the server.
    wanted = re.compile("|".join(f"{name}[ {{]" for name in _READ))
    lines = [line for line in text.splitlines() if wanted.match(line)]
    values: dict[str, list[float]] = {}
    labels: dict[str, str] = {}
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            if sample.name == _INFO:
                labels = dict(sample.labels)
            else:
                values.setdefault(sample.name, []).append(sample.value)
    return {
        name: sum(found) / (len(found) if name == _HELD else 1) for name, found in values.items()
    }, labels


def pool(text: str, bytes_given: float | None) -> Pool:
    """The KV-cache pool that a server reports on ``/metrics``.

    Raises:
        ValueError: it does not say; then it is not a vLLM server.
    """
    _, labels = read_metrics(text)
    try:
        block = int(labels["block_size"])
        blocks = int(labels["num_gpu_blocks"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"/metrics has no {_INFO} with the pool's size: is this vLLM?") from error
    reported = labels.get("kv_cache_memory_bytes", "")
    size = bytes_given or (float(reported) if reported.isdigit() else None)
    return Pool(blocks, block, size)


@dataclass(frozen=True)
class Scrape:
    """One reading; ``at`` in seconds of ``time.perf_counter``."""

    at: float
    values: dict[str, float]
    joules: float | None


class Sampler(threading.Thread):
    """Reads until it is stopped; a context manager.

    Args:
        read: returns the text of ``/metrics``.
        interval: seconds between two readings.
        meter: energy counter, if there is one.
    """

    def __init__(self, read: Callable[[], str], interval: float, meter: Meter | None) -> None:
        super().__init__(daemon=True)
        self._read, self._interval, self._meter = read, interval, meter
        self._ended = threading.Event()
        self.scrapes: list[Scrape] = []
        self.missed = 0

    def __enter__(self) -> Sampler:
        self._once()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()
        self._once()

    def run(self) -> None:
        """The thread."""
        while not self._ended.wait(self._interval):
            self._once()

    def _once(self) -> None:
        try:
            values, _ = read_metrics(self._read())
        except _FAILURES:
            self.missed += 1  # told with the results
            return
        joules = self._meter.joules() if self._meter else None
        self.scrapes.append(Scrape(time.perf_counter(), values, joules))


def columns(scrapes: list[Scrape], begin: float, end: float) -> dict[str, list[float]]:
    """Readings between two times of ``time.perf_counter``, by column."""
    inside = [s for s in scrapes if begin <= s.at <= end and _HELD in s.values]
    return {
        "seconds": [round(s.at - begin, 3) for s in inside],
        "held": [s.values[_HELD] for s in inside],
        "running": [s.values.get(_RUNNING, 0.0) for s in inside],
        "waiting": [s.values.get(_WAITING, 0.0) for s in inside],
    }


def differences(scrapes: list[Scrape], begin: float, end: float) -> dict[str, float]:
    """What was counted over a load: ``preemptions``, ``compactions``, ``joules``.

    A count is missing where the server does not show it; compactions only a compressed arm counts.
    """
    found: dict[str, float] = {}
    if not scrapes:
        return found
    first, last = scrapes[0].values, scrapes[-1].values
    for name, key in (("preemptions", _PREEMPTIONS), ("compactions", _COMPACTIONS)):
        if key in first and key in last:
            found[name] = last[key] - first[key]
    measured = [(s.at, s.joules) for s in scrapes if s.joules is not None]
    if len(measured) > 1:
        # Between two readings energy is taken to grow evenly.
        found["joules"] = _at(measured, end) - _at(measured, begin)
    return found


def _at(points: list[tuple[float, float]], time_: float) -> float:
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if time_ <= x1:
            share = min(1.0, max(0.0, (time_ - x0) / (x1 - x0)))
            return y0 + share * (y1 - y0)
    return points[-1][1]
