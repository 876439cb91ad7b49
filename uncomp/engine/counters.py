"""Counters of the engine process, shared with the API server through a small memory-mapped file.

vLLM's scheduler lives in another process than its ``/metrics`` endpoint, and the statistics that
travel between them have no room for ours. A file of float64 values, written in place, costs about a
microsecond per update and can be read by the API server, `uncomp doctor` and tests alike.

The engine holds a lock on its file while it lives, so files of engines that were killed can be told
from those in use, whatever their process ids are, and the next engine removes them.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import tempfile
from pathlib import Path
from typing import IO, Any

from uncomp.envs import metrics_dir

REFUSALS = ("opted_out", "invalid_settings", "streaming_input", "no_free_block", "prompt_logprobs")
#: upper bounds of the kept-ratio histogram (kept over seen tokens of one compaction)
KEPT_RATIO_BUCKETS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)
NAMES = (
    "engine_pid",
    "requests_compressed",
    "compactions",
    "tokens_seen",
    "tokens_kept",
    "blocks_freed",
    "score_seconds",
    "move_seconds",
    "orders_sent",
    "blocks_held",
    "blocks_held_max",
    "block_bytes",
    "requests_running_max",
    "kept_ratio_sum",
    "prompts_pruned",
    "prefill_token_layers",
    "prefill_token_layers_read",
    "choose_seconds",
    *(f"refused_{reason}" for reason in REFUSALS),
    *(f"kept_ratio_le_{bound}" for bound in KEPT_RATIO_BUCKETS),
)
_SIZE = 8 * len(NAMES)


def counter_file(instance_id: str, rank: int = 0) -> Path:
    """Where the engine ``instance_id`` (vLLM's id of one configuration) counts."""
    return metrics_dir() / f"{instance_id}-{rank}.f64"


class Counters:
    """Named float64 counters backed by a file.

    Args:
        path: created (zeroed) if missing and ``create`` is set.
        create: the engine side creates, readers do not.

    Raises:
        FileNotFoundError: reading before the engine has created the file.
    """

    def __init__(self, path: Path, create: bool = True) -> None:
        self.path = path
        self._index = {name: i for i, name in enumerate(NAMES)}
        if create:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            remove_stale(path.parent)
            self._locked = _create_locked(path)
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SIZE)
        if create:
            self["engine_pid"] = os.getpid()

    def __getitem__(self, name: str) -> float:
        return struct.unpack_from("d", self._map, 8 * self._index[name])[0]

    def __setitem__(self, name: str, value: float) -> None:
        struct.pack_into("d", self._map, 8 * self._index[name], value)

    def add(self, name: str, value: float = 1.0) -> None:
        self[name] = self[name] + value

    def refused(self, reason: str) -> None:
        """Count a request (or an attempt) that is not compressed, by reason."""
        self.add(f"refused_{reason}")

    def compacted(self, order: Any, receipt: Any, freed: int) -> None:
        """Count one finished compaction."""
        self.add("compactions")
        if order.generation == 1:
            self.add("requests_compressed")
        self.add("tokens_seen", receipt.tokens_seen)
        self.add("tokens_kept", receipt.tokens_kept)
        self.add("score_seconds", receipt.score_seconds)
        self.add("move_seconds", receipt.move_seconds)
        self.add("blocks_freed", freed)
        ratio = receipt.tokens_kept / receipt.tokens_seen
        self.add("kept_ratio_sum", ratio)
        for bound in KEPT_RATIO_BUCKETS:
            if ratio <= bound:
                self.add(f"kept_ratio_le_{bound}")

    @property
    def rank(self) -> int:
        """Data-parallel rank of the engine."""
        return int(self.path.stem.rpartition("-")[2])

    def snapshot(self) -> dict[str, float]:
        """All values by name."""
        return dict(zip(NAMES, struct.unpack_from(f"{len(NAMES)}d", self._map), strict=True))

    def remove(self) -> None:
        """Delete the file (the engine's last act)."""
        self.path.unlink(missing_ok=True)


def remove_stale(folder: Path) -> None:
    """Delete the counter files of engines that no longer live (they were killed)."""
    for path in folder.glob("*.f64"):
        try:
            with open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except OSError:
            continue  # in use, gone already, or another user's


def _create_locked(path: Path) -> IO[bytes]:
    """A zeroed file at `path` whose lock is held until it is closed or this process ends."""
    # Locked before it gets its name; another engine that starts now would take it for stale.
    descriptor, temporary = tempfile.mkstemp(prefix=path.stem, dir=path.parent)
    file = os.fdopen(descriptor, "r+b")
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(bytes(_SIZE))
    file.flush()
    os.replace(temporary, path)
    return file


def open_counters(instance_id: str) -> list[Counters]:
    """Counters of every engine (data-parallel rank) of one instance, for reading."""
    found = sorted(
        metrics_dir().glob(f"{instance_id}-*.f64"), key=lambda path: (len(path.name), path)
    )
    return [Counters(path, create=False) for path in found if path.stat().st_size == _SIZE]
