"""The load: a child process with vLLM's own serving benchmark, and the arguments it gets."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uncomp.eval.bench.serve_plan import Load, Plan, Shape
from uncomp.eval.bench.serve_trace import Arrival

PERCENTILES = (50, 90, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2el")


class ClientError(RuntimeError):
    """The load could not be put on the server at all; the message says why."""


@dataclass(frozen=True)
class Traffic:
    """What is sent, the same to both arms.

    Attributes:
        model, tokenizer: names for the client; "" for what the server says.
        seed: of prompts and arrivals.
        trace: requests of the trace, for loads of that mode.
    """

    plan: Plan
    model: str = ""
    tokenizer: str = ""
    seed: int = 0
    trace: tuple[Arrival, ...] = ()

    def order(self, url: str, load: Load) -> dict[str, Any]:
        """What the child is told for a load."""
        trace = None
        if load.mode == "trace":
            trace = [
                {**dataclasses.asdict(r), "seconds": r.seconds / load.level} for r in self.trace
            ]
        argv = self._arguments(url, load, self.plan.count(load), self.seed)
        return {"argv": argv, "trace": trace, "seed": self.seed}

    def warm_up(self, url: str) -> dict[str, Any] | None:
        """The same for the requests before the first load; None if there are none."""
        if not self.plan.warm_up:
            return None
        seed = self.seed + 1
        if self.trace:
            first = self.trace[: self.plan.warm_up]
            trace = [{**dataclasses.asdict(r), "seconds": 0.0} for r in first]
            argv = self._arguments(url, Load("trace", 1), len(trace), seed)
            return {"argv": argv, "trace": trace, "seed": seed}
        each = max(1, self.plan.shape.prefixes)
        count = -(-self.plan.warm_up // each) * each
        argv = self._arguments(url, Load("concurrency", count), count, seed)
        return {"argv": argv, "trace": None, "seed": seed}

    def _arguments(self, url: str, load: Load, count: int, seed: int) -> list[str]:
        salt = uuid.uuid4().hex  # no load finds another's prompts in the prefix cache
        return [
            "--backend", "openai", "--endpoint", "/v1/completions", "--base-url", url,
            *(["--model", self.model] if self.model else []),
            *(["--tokenizer", self.tokenizer] if self.tokenizer else []),
            "--seed", str(seed), "--num-prompts", str(count),
            "--ignore-eos", "--temperature", "0",  # equal work: every answer has its full length
            "--extra-body", json.dumps({"cache_salt": salt}),
            "--request-id-prefix", f"bench-{salt[:8]}-",
            "--percentile-metrics", ",".join(LATENCIES),
            "--metric-percentiles", ",".join(map(str, PERCENTILES)),
            "--save-detailed", "--disable-tqdm",
            *_mode(load), *([] if load.mode == "trace" else _dataset(self.plan.shape)),
        ]  # fmt: skip


def _mode(load: Load) -> list[str]:
    if load.mode == "concurrency":
        return ["--max-concurrency", str(int(load.level))]
    if load.mode == "rate":
        return ["--request-rate", str(load.level), "--burstiness", "1"]  # 1: Poisson
    # Only this data set sends at recorded times; the child puts its own requests in.
    return ["--dataset-name", "timed_trace", "--dataset-path", os.devnull]


def _dataset(shape: Shape) -> list[str]:
    if not shape.prefixes:
        lengths = ["--random-input-len", str(shape.prompt), "--random-output-len"]
        return ["--dataset-name", "random", *lengths, str(shape.output)]
    return [
        "--dataset-name", "prefix_repetition",
        "--prefix-repetition-prefix-len", str(shape.prefix),
        "--prefix-repetition-suffix-len", str(shape.prompt - shape.prefix),
        "--prefix-repetition-num-prefixes", str(shape.prefixes),
        "--prefix-repetition-output-len", str(shape.output),
    ]  # fmt: skip


class Client:
    """The child process, as a context manager.

    Args:
        log: file that receives what it prints.
        timeout: seconds that one load may take.
    """

    def __init__(self, log: Path, timeout: float) -> None:
        self._log, self._timeout = log, timeout
        self._answers: queue.Queue[str] = queue.Queue()

    def __enter__(self) -> Client:
        # Safe path: the folder kernels/ of a checkout must not shadow the package of that name.
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-m", "uncomp.eval.bench.serve_client_child"]
        with open(self._log, "ab") as log:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,
            )
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        """Send the requests of an order and wait for all answers; vLLM's result.

        Raises:
            ClientError: the client refused, ended or took too long. Failed requests are no error
                here: they are counted in the result.
        """
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(order) + "\n")
            self._child.stdin.flush()
            line = self._answers.get(timeout=self._timeout)
        except BrokenPipeError:
            line = ""
        except queue.Empty as error:
            raise ClientError(
                f"a load took more than {self._timeout:g} s (--load-timeout; log: {self._log})"
            ) from error
        if not line:
            text = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
            raise ClientError("\n".join(["the client ended", *text[-25:], f"(log: {self._log})"]))
        answer = json.loads(line)
        if "error" in answer:
            text = answer["error"].strip().splitlines()
            shown = "\n".join(text[-8:])
            raise ClientError(f"vLLM's benchmark client failed (log: {self._log})\n{shown}")
        return answer["result"]

    def _listen(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._answers.put(line)
        self._answers.put("")  # it has ended
