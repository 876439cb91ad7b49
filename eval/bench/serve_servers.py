"""The servers of a comparison: processes of this machine, or URLs of servers that run already."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from uncomp.cli.server import Server, ServerError
from uncomp.eval.bench.cpu import ARMS as CPU_ARMS

#: what makes `uncomp serve` stock vLLM: no flag of ours is passed on, and the plugin is not loaded
STOCK = {"UNCOMP_DISABLE": "1", **CPU_ARMS["stock"][1]}

#: seconds that processes of an ended server get to end by themselves
PATIENCE = 10.0


@dataclass(frozen=True)
class Target:
    """A server that answers.

    Attributes:
        url: without path, e.g. ``http://127.0.0.1:8000``.
        start_seconds: until it was ready; None if it ran before.
        process: to ask whether it still runs; None if it is not ours.
    """

    url: str
    start_seconds: float | None = None
    process: ArmServer | None = None

    def check(self) -> None:
        """See that the server still runs.

        Raises:
            ServerError: it has ended; the message shows the end of its log.
        """
        if self.process is not None and self.process.process.poll() is not None:
            raise ServerError(f"the server ended during the load\n{self.process.tail()}")


class ArmServer(Server):
    """A server whose own processes end with it, however it ends."""

    def __enter__(self) -> ArmServer:
        self._children: set[psutil.Process] = set()
        super().__enter__()
        self._notice()
        return self

    def __exit__(self, *unused: object) -> None:
        self._notice()
        super().__exit__(*unused)
        _, alive = psutil.wait_procs(list(self._children), timeout=PATIENCE)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def tail(self) -> str:
        """The end of the log."""
        return self._tail()

    def _notice(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self._children.update(psutil.Process(self.process.pid).children(recursive=True))


@dataclass(frozen=True)
class Servers:
    """How to get a server of either arm.

    Attributes:
        model: checkpoint or hub name; "" with URLs: whatever they serve.
        kv: uncomp's settings, for the compressed arm.
        arguments: of `vllm serve`, for both.
        pool_bytes: of the KV cache, for both.
        urls: arm -> URL of a server that runs already; empty: start them.
        timeout: seconds that a start may take.
    """

    model: str
    kv: Mapping[str, Any]
    arguments: tuple[str, ...] = ()
    pool_bytes: int | None = None
    urls: Mapping[str, str] | None = None
    timeout: float = 1200.0

    @contextlib.contextmanager
    def open(self, arm: str, log: Path) -> Iterator[Target]:
        """A server of an arm, ready; ended afterwards if it is ours.

        Raises:
            ServerError: it did not come up; the message shows the end of its log.
        """
        if self.urls:
            yield Target(self.urls[arm].rstrip("/"))
            return
        begin = time.perf_counter()
        environment = STOCK if arm == "full" else {}
        with ArmServer(self.command(), log, environment, self.timeout) as server:
            url = f"http://127.0.0.1:{server.port}"
            yield Target(url, time.perf_counter() - begin, server)

    def command(self) -> list[str]:
        """Arguments of `uncomp serve`, the same for both arms: the environment tells them apart."""
        pool = [] if self.pool_bytes is None else ["--kv-cache-memory-bytes", str(self.pool_bytes)]
        quiet = "--disable-uvicorn-access-log"  # else every reading of /metrics is a line
        return [self.model, *kv_flags(self.kv), *pool, quiet, *self.arguments]


def kv_flags(settings: Mapping[str, Any]) -> list[str]:
    """uncomp's settings as flags of `uncomp serve`."""
    from uncomp.cli.settings import flag

    found = []
    for name, value in settings.items():
        if isinstance(value, bool):
            found.append(flag(name) if value else flag(name).replace("--", "--no-", 1))
        elif value is not None:
            found.append(f"{flag(name)}={value}")
    return found
