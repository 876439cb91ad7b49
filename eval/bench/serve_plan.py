"""What to serve and in which order: shapes of traffic, loads, sessions."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

ARMS = ("full", "compressed")
#: seconds of traffic for a rate, unless the number of requests is given
RATE_SECONDS = 60


@dataclass(frozen=True)
class Shape:
    """What the requests of a synthetic load look like.

    Attributes:
        about: one line for the help.
        prompt: tokens of a whole prompt, the shared prefix included.
        output: tokens of an answer, always all of them.
        prefix, prefixes: shared tokens at the beginning, and how many different beginnings there
            are; 0 for none.
    """

    name: str
    about: str
    prompt: int
    output: int
    prefix: int = 0
    prefixes: int = 0

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.output < 1:
            raise ValueError(
                f"{self.name}: prompt of {self.prompt} and output of {self.output} tokens: both "
                f"must be at least 1"
            )
        if bool(self.prefix) != bool(self.prefixes) or not 0 <= self.prefix < self.prompt:
            raise ValueError(
                f"{self.name}: {self.prefixes} prefixes of {self.prefix} tokens in prompts of "
                f"{self.prompt}: give both or neither, and a prefix shorter than the prompt"
            )

    def __str__(self) -> str:
        shared = f" ({self.prefix} shared by {self.prefixes})" if self.prefixes else ""
        return f"{self.name} {self.prompt}{shared} + {self.output}"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("long-prompt", "long prompt, short answer (documents, code)", 4096, 128),
        Shape("long-answer", "short prompt, long answer (reasoning)", 128, 2048),
        Shape("shared-prefix", "prompts that share a long beginning", 4096, 128, 3584, 4),
    )
}


@dataclass(frozen=True)
class Load:
    """One way of sending requests.

    Attributes:
        mode: ``concurrency`` (always that many in flight), ``rate`` (Poisson arrivals) or
            ``trace`` (recorded arrivals).
        level: requests in flight; requests/s; speed of the trace.
    """

    mode: str
    level: float

    def __post_init__(self) -> None:
        if not (self.level > 0 and math.isfinite(self.level)):
            raise ValueError(f"{self.mode} {self.level:g}: must be above 0")
        if self.mode == "concurrency" and self.level != int(self.level):
            raise ValueError(f"concurrency {self.level:g}: must be a whole number")

    def __str__(self) -> str:
        unit = {"rate": " requests/s", "trace": " x speed"}.get(self.mode, "")
        return f"{self.mode} {self.level:g}{unit}"


@dataclass(frozen=True)
class Plan:
    """A whole comparison.

    Attributes:
        shape: of synthetic loads.
        loads: in the order in which every server gets them.
        rounds: servers per arm.
        requests: per load; None: 4 per request in flight, or a minute of arrivals, at least 8.
        warm_up: requests before the first measured one of every server.
        trace_requests, trace_tokens, trace_seconds: (requests), (prompt, answer tokens) and
            duration of the trace.
    """

    shape: Shape
    loads: tuple[Load, ...]
    rounds: int = 2
    requests: int | None = None
    warm_up: int = 2
    trace_requests: int = 0
    trace_tokens: tuple[int, int] = (0, 0)
    trace_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.loads:
            raise ValueError("nothing to do: give --concurrency, --rate or --trace")
        if len(set(self.loads)) < len(self.loads):
            raise ValueError(f"a load is given twice: {', '.join(map(str, self.loads))}")
        if self.rounds < 1 or self.warm_up < 0 or (self.requests is not None and self.requests < 1):
            raise ValueError(
                f"rounds {self.rounds} and requests {self.requests} must be at least 1, warm-up "
                f"{self.warm_up} at least 0"
            )

    def count(self, load: Load) -> int:
        """Requests of a load."""
        if load.mode == "trace":
            return self.trace_requests
        per_level = 4 if load.mode == "concurrency" else RATE_SECONDS
        wanted = self.requests or max(8, math.ceil(per_level * load.level))
        # vLLM deals whole numbers of requests to the prefixes.
        each = self.shape.prefixes or 1
        return math.ceil(wanted / each) * each

    def sessions(self) -> list[Session]:
        """All servers to start, in order: A B, then B A, so that a drift hits both arms alike."""
        return [
            Session(arm, number + 1, self.loads)
            for number in range(self.rounds)
            for arm in (ARMS if number % 2 == 0 else ARMS[::-1])
        ]


@dataclass(frozen=True)
class Session:
    """One life of one arm's server."""

    arm: str
    round: int
    loads: tuple[Load, ...]

    def file(self, load: Load) -> str:
        """Name of the file with the result of a load."""
        return f"round{self.round}-{self.arm}-{load.mode}-{load.level:g}.json"


def fingerprint(plan: Plan) -> dict[str, Any]:
    """What must be equal for results to belong together; more rounds may be added later."""
    found = dataclasses.asdict(plan)
    del found["rounds"]
    found["loads"] = [str(load) for load in plan.loads]
    return found
