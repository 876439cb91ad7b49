"""Compressed against full-cache serving over HTTP: starts the servers, puts the loads on them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from uncomp.cli.server import ServerError
from uncomp.eval.bench import serve_energy
from uncomp.eval.bench.rows import machine
from uncomp.eval.bench.serve_client import Client, Traffic
from uncomp.eval.bench.serve_clock import Clock
from uncomp.eval.bench.serve_measure import measured
from uncomp.eval.bench.serve_plan import Load, Session
from uncomp.eval.bench.serve_records import Measured, Pool
from uncomp.eval.bench.serve_sampling import Sampler, fetch, pool
from uncomp.eval.bench.serve_servers import Servers, Target
from uncomp.eval.bench.serve_store import Store

#: by how many blocks the pools of the two arms may differ: the null block, and what is left over
#: where the pool is no multiple of a block
POOL_TOLERANCE = 2


@dataclass
class Bench:
    """One comparison.

    Attributes:
        interval: seconds between readings of ``/metrics``.
        load_timeout: seconds that one load may take.
        say: reports progress.
    """

    servers: Servers
    traffic: Traffic
    store: Store
    clock: Clock
    interval: float
    load_timeout: float
    say: Callable[[str], None]

    def run(self, most_sessions: int | None = None) -> bool:
        """Measure what is not there yet; whether all of it is there now.

        Args:
            most_sessions: stop after so many servers; the next call goes on.

        Raises:
            ServerError, ClientError: a server or the client failed; what was finished is kept.
        """
        for record in self.store.results(self.traffic.plan.sessions()):
            self.clock.took(Load(record.mode, record.level), record.seconds)
        todo = self._todo()
        if not todo:
            return True
        self.meter, source = serve_energy.find()
        self.facts = {**machine(), "energy": source}
        self.say(f"energy: {source}")
        with Client(self.store.runs / "client.log", self.load_timeout) as client:
            for session in todo[:most_sessions]:
                self._session(client, session)
        return not self._todo()

    def _todo(self) -> list[Session]:
        """Sessions with the loads that are not finished."""
        found = []
        for session in self.traffic.plan.sessions():
            loads = tuple(x for x in session.loads if not self.store.has(session, x))
            if loads:
                found.append(Session(session.arm, session.round, loads))
        return found

    def _session(self, client: Client, session: Session) -> None:
        left = self.clock.left(self._todo(), not self.servers.urls)
        what = f"round {session.round} of {self.traffic.plan.rounds}, {session.arm}"
        self.say(f"{what}: server (about {_span(left)} left)")
        log = self.store.runs / f"round{session.round}-{session.arm}.log"
        with self.servers.open(session.arm, log) as target:
            if target.start_seconds is not None:
                self.clock.started(target.start_seconds)
            size = self._pool(target, session)
            warm_up = self.traffic.warm_up(target.url)
            if warm_up is not None:
                result = client.run(warm_up)
                if result["failed"]:
                    raise ServerError(
                        f"{result['failed']} of the warm-up requests failed; the first said: "
                        f"{next(e for e in result['errors'] if e)}"
                    )
            for load in session.loads:
                record = self._load(client, target, session, load, size)
                self.store.put(session, load, record)
                self.clock.took(load, record.seconds)
                left = self.clock.left(self._todo(), not self.servers.urls)
                self.say(f"{what}, {load}: {_summary(record)} (about {_span(left)} left)")
                for error in record.errors:
                    self.say(f"  a request failed: {error}")

    def _pool(self, target: Target, session: Session) -> Pool:
        """The server's pool, which must be that of the servers before."""
        found = pool(fetch(f"{target.url}/metrics"), self.servers.pool_bytes)
        for earlier in self.store.results(self.traffic.plan.sessions()):
            block = max(earlier.pool.block_size, found.block_size)
            if abs(earlier.pool.tokens - found.tokens) > POOL_TOLERANCE * block:
                raise ServerError(
                    f"the {session.arm} server has a KV pool of {found.tokens} tokens, the "
                    f"{earlier.arm} one had {earlier.pool.tokens}: a comparison needs equal pools "
                    f"(--pool-bytes)"
                )
        return found

    def _load(
        self, client: Client, target: Target, session: Session, load: Load, size: Pool
    ) -> Measured:
        order = self.traffic.order(target.url, load)
        begin = time.perf_counter()
        sampler = Sampler(lambda: fetch(f"{target.url}/metrics"), self.interval, self.meter)
        with sampler:
            result = client.run(order)
        target.check()
        if sampler.missed:
            took = time.perf_counter() - begin
            self.say(f"  {sampler.missed} readings of /metrics failed in {took:.0f} s")
        expected = [r.output_tokens for r in self.traffic.trace] or [0]
        if load.mode != "trace":
            expected = [self.traffic.plan.shape.output]
        return measured(
            session, load, result, sampler.scrapes, sampler.missed, expected, size, self.facts
        )


def _summary(record: Measured) -> str:
    found = record.metrics
    held = f", {found['held_peak_share']:.0f} % of the pool" if "held_peak_share" in found else ""
    ttft = f", TTFT {found['ttft_p50']:.0f} ms" if "ttft_p50" in found else ""
    return (
        f"{found['output_throughput']:.1f} output tokens/s{ttft}{held}, "
        f"{found['completed']:.0f} completed, {found['failed']:.0f} failed"
    )


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
