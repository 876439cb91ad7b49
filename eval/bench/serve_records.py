"""What serving runs leave behind: plain data, JSON-ready, for rows and plots. No engine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LoadPoint:
    """One arm under one load: a point of "throughput over concurrency".

    Attributes:
        arm: ``full`` or ``compressed``.
        mode: ``concurrency``, ``rate`` or ``trace``.
        level: requests in flight, requests/s offered, or speed of the trace (1 = as recorded).
        metrics: name in :data:`uncomp.eval.bench.serve_rows.METRICS` -> (median, low, high) over
            the rounds; low and high are 20 % and 80 % quantiles.
    """

    arm: str
    mode: str
    level: float
    metrics: Mapping[str, tuple[float, float, float]]


@dataclass(frozen=True)
class HeldSeries:
    """KV-cache bytes in use by requests over the time of one load.

    Attributes:
        arm: ``full`` or ``compressed``.
        seconds: since the first request of the load was sent, ascending.
        bytes: held at that time: vLLM's ``kv_cache_usage_perc`` of the pool's usable bytes.
        mode, level, round: which load, and which repetition of it (from 1).
    """

    arm: str
    seconds: tuple[float, ...]
    bytes: tuple[float, ...]
    mode: str = ""
    level: float = 0.0
    round: int = 0


@dataclass(frozen=True)
class Pool:
    """An arm's KV-cache pool, as its server reports it.

    Attributes:
        blocks: in the pool; one of them is vLLM's null block, which never holds anything.
        block_size: tokens per block, of all heads.
        bytes: of the pool; None if neither the user nor the server says.
    """

    blocks: int
    block_size: int
    bytes: float | None = None

    @property
    def tokens(self) -> int:
        """Tokens that fit uncompressed."""
        return (self.blocks - 1) * self.block_size

    @property
    def usable_bytes(self) -> float | None:
        """Bytes of the blocks that can hold something, to within one block."""
        return None if self.bytes is None else self.bytes * (self.blocks - 1) / self.blocks


@dataclass(frozen=True)
class Measured:
    """One load on one arm's server, once.

    Attributes:
        arm, round, mode, level: which.
        seconds: from the first request to the last answer.
        metrics: numbers by name, see :data:`uncomp.eval.bench.serve_rows.METRICS`; a metric that
            could not be read is missing.
        sampled: column -> values over the load, sampled from ``/metrics``: ``seconds`` since the
            first request, ``held`` (share of the pool), ``running``, ``waiting`` (requests).
        missed: scrapes of ``/metrics`` that failed.
        errors: what failed requests said, each text once.
        pool: of the server.
        facts: of the code and the machine at that time.
    """

    arm: str
    round: int
    mode: str
    level: float
    seconds: float
    metrics: Mapping[str, float]
    sampled: Mapping[str, list[float]]
    missed: int
    errors: tuple[str, ...]
    pool: Pool
    facts: Mapping[str, str] = field(default_factory=dict)

    def held(self) -> HeldSeries | None:
        """KV bytes over time; None if the pool's bytes are not known."""
        size = self.pool.usable_bytes
        if size is None:
            return None
        return HeldSeries(
            self.arm,
            tuple(self.sampled["seconds"]),
            tuple(share * size for share in self.sampled["held"]),
            self.mode,
            self.level,
            self.round,
        )


def save(record: Measured, path: Path) -> None:
    """Write a record in one step, so that an interrupted run leaves no half of one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(dataclasses.asdict(record)), encoding="utf-8")
    part.replace(path)


def load(path: Path) -> Measured:
    """Read what :func:`save` wrote.

    Raises:
        ValueError: the file is something else.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found["pool"] = Pool(**found["pool"])
        found["errors"] = tuple(found["errors"])
        return Measured(**found)
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a result of this version ({error}): remove it to measure it again"
        ) from error
