"""A server process and just enough of an HTTP client, for the demo and the tests."""

import json
import os
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class ServerError(RuntimeError):
    """The server did not start, or answered with an error."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """`uncomp serve` on a free port of this machine, as a context manager.

    Args:
        arguments: of `uncomp serve`, without host and port.
        log: file that receives everything the server prints.
        environment: variables to add to this process's own.
        timeout: seconds that it may take to start.

    Raises:
        ServerError: it ended or was not ready in time; the message shows the end of its log.
    """

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        timeout: float = 600,
    ) -> None:
        self.log, self.timeout = log, timeout
        self.port = _free_port()
        script = Path(sysconfig.get_path("scripts"), "uncomp")
        host = ["--host", "127.0.0.1", "--port", str(self.port)]
        self._command = [str(script), "serve", *arguments, *host]
        self._environment = {**os.environ, **(environment or {})}

    def __enter__(self) -> "Server":
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(
                self._command, stdout=output, stderr=subprocess.STDOUT, env=self._environment
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def get(self, path: str) -> str:
        """The body of a GET request."""
        with self._open(path) as response:
            return response.read().decode()

    def post(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> Any:
        """The JSON answer to a JSON body.

        Raises:
            ServerError: a status other than 200; the message is the server's.
        """
        with self._open(path, body, headers) as response:
            return json.load(response)

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer, as they come."""
        with self._open(path, {**body, "stream": True}) as response:
            for line in response:
                data = line.decode().strip().removeprefix("data: ")
                if data and data != "[DONE]":
                    yield json.loads(data)

    def metrics(self) -> dict[str, float]:
        """The samples of `/metrics` that are uncomp's, summed over label values by full name."""
        totals: dict[str, float] = {}
        for line in self.get("/metrics").splitlines():
            if line.startswith("uncomp:"):
                name, _, value = line.rpartition(" ")
                name = name.split("{")[0]
                totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    def _open(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data,
            {"Content-Type": "application/json", **(headers or {})},
        )
        try:
            return urllib.request.urlopen(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise ServerError(f"status {error.code}: {text}", error.code) from error

    def _wait(self) -> None:
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(
                    f"the server ended (status {self.process.returncode})\n{self._tail()}"
                )
            try:
                self.get("/health")
                return
            except (OSError, ServerError):
                time.sleep(0.25)
        raise ServerError(f"the server was not ready after {self.timeout:.0f} s\n{self._tail()}")

    def _tail(self, lines: int = 25) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([*text[-lines:], f"(all of it: {self.log})"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
