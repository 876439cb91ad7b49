"""Random clients for a simulated server."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from simulate import Simulation


@dataclass
class Traffic:
    """Adds and aborts requests between, before and after the steps of ``simulation``.

    Attributes:
        arrivals: chance that somebody sends a prompt before a step.
        aborts: chance that somebody hangs up at any of the moments the simulation offers.
        resets: chance that the operator resets the prefix cache, which preempts every request.
        longest: prompt and output together, tokens.
    """

    simulation: Simulation
    random: random.Random
    arrivals: float = 0.4
    aborts: float = 0.03
    resets: float = 0.01
    longest: int = 90
    _sent: int = 0
    _prefixes: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._prefixes = [self._tokens(self.random.randint(4, 40)) for _ in range(3)]

    def run(self, steps: int) -> None:
        """Make ``steps`` steps with traffic, then let everything finish."""
        for _ in range(steps):
            if self.random.random() < self.arrivals and len(self.simulation.requests) < 24:
                self._send()
            if self.random.random() < self.resets:
                self.simulation.scheduler.reset_prefix_cache(reset_running_requests=True)
                self.simulation.check()
            self.simulation.step(self._moment)
        self.simulation.drain()

    def _moment(self, moment: str) -> None:
        requests = list(self.simulation.requests)
        if requests and self.random.random() < self.aborts:
            self.simulation.abort(self.random.choice(requests))

    def _send(self) -> None:
        prompt = self.random.choice([*self._prefixes, []]) + self._tokens(
            self.random.randint(1, 30)
        )
        prompt = prompt[: self.longest - 2]
        if self.random.random() < 0.3:
            self._prefixes[self.random.randrange(3)] = prompt[: self.random.randint(4, 60)]
        extra = self._settings()
        most = self.random.randint(1, min(50, self.longest - len(prompt)))
        # n > 1 reaches the scheduler as several requests with the same prompt.
        for _ in range(self.random.choice([1, 1, 1, 2, 3])):
            self.simulation.add(self._name(), prompt, most, **extra)

    def _name(self) -> str:
        """Mostly new; sometimes one that is free again and not on its way any more."""
        used = {i for s in self.simulation.in_flight for i in s.output.num_scheduled_tokens}
        again = sorted(self.simulation.finished - used)
        if again and self.random.random() < 0.2:
            return self.random.choice(again)
        self._sent += 1
        return f"request-{self._sent}"

    def _settings(self) -> dict[str, Any]:
        if self.random.random() < 0.6:
            return {}
        return self.random.choice(
            [
                {"kv_compress": False},
                {"kv_keep": 0.3},
                {"kv_keep": 0.9, "kv_protect": "2:7"},
                {"kv_budget": 12},
                {"kv_budget": 8, "kv_protect": ["0:3", "-4:"]},
                {"kv_protect": "0:5,3:9"},
                {"kv_policy": "streaming", "kv_report": True},
                {"kv_keep": 0.4, "kv_compact_at": 9},
                {"kv_budget": 8, "kv_compact_at": -3},
                {"kv_settings": {"window": 2, "sinks": 2, "recompact_every": 8}},
                {"kv_policy": "adakv", "kv_settings": '{"window": 1}', "kv_budget": 8},
            ]
        )

    def _tokens(self, count: int) -> list[int]:
        return [self.random.randrange(1, self.simulation.setup.vocabulary) for _ in range(count)]
