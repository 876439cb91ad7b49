"""How long a serving comparison takes: an estimate before it, the time left during it."""

from __future__ import annotations

from dataclasses import dataclass, field

from uncomp.eval.bench.serve_plan import Load, Plan, Session


@dataclass
class Clock:
    """How long things take: assumed at first, corrected by what has been measured.

    Attributes:
        prefill: prompt tokens/s of the server, assumed.
        decode: tokens/s of one request, assumed.
        start: seconds until a server is ready, assumed, then the mean of those seen.
    """

    plan: Plan
    prefill: float
    decode: float
    start: float
    _expected: float = 0.0
    _taken: float = 0.0
    _starts: list[float] = field(default_factory=list)

    def expect(self, load: Load) -> float:
        """Seconds of a load at the assumed speeds; at least as long as its requests arrive."""
        count = self.plan.count(load)
        prompt, output = self.plan.shape.prompt, self.plan.shape.output
        arrive, together = 0.0, load.level
        total_prompt, total_output = float(count * prompt), float(count * output)
        if load.mode == "trace":
            total_prompt, total_output = map(float, self.plan.trace_tokens)
            arrive, together = self.plan.trace_seconds / load.level, 4.0
        elif load.mode == "rate":
            arrive, together = count / load.level, 4.0
        work = total_prompt / self.prefill + total_output / (self.decode * together)
        return max(arrive, work)

    def took(self, load: Load, seconds: float) -> None:
        """A load has been measured."""
        self._expected += self.expect(load)
        self._taken += seconds

    def started(self, seconds: float) -> None:
        """A server is ready after so many seconds."""
        self._starts.append(seconds)
        self.start = sum(self._starts) / len(self._starts)

    def left(self, sessions: list[Session], servers: bool) -> float:
        """Seconds that remain; ``servers``: whether each session starts one."""
        factor = self._taken / self._expected if self._expected else 1.0
        loads = sum(self.expect(load) for session in sessions for load in session.loads)
        return factor * loads + (self.start * len(sessions) if servers else 0.0)


def described(plan: Plan, clock: Clock, servers: bool) -> str:
    """The plan as text, for ``--dry-run``."""
    sessions = plan.sessions()
    lines = [f"{'requests':>8}  {'about':>8}  load"]
    for load in plan.loads:
        lines.append(f"{plan.count(load):>8}  {clock.expect(load):>6.0f} s  {load}")
    order = " ".join(session.arm for session in sessions)
    lines.append(f"order of servers: {order}")
    total = clock.left(sessions, servers)
    lines.append(
        f"about {total / 60:.0f} min in all, assuming {clock.prefill:g} prompt tokens/s, "
        f"{clock.decode:g} tokens/s per request"
        + (f" and {clock.start:g} s until a server is ready" if servers else "")
        + " (--expect-...); what is measured replaces this"
    )
    return "\n".join(lines)
