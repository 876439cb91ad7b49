"""The course of a comparison without an engine: order, resuming, servers that fail, children."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from uncomp.cli.server import ServerError
from uncomp.eval.bench import serve
from uncomp.eval.bench.serve_client import Traffic
from uncomp.eval.bench.serve_clock import Clock
from uncomp.eval.bench.serve_plan import SHAPES, Load, Plan
from uncomp.eval.bench.serve_servers import Servers, Target
from uncomp.eval.bench.serve_store import Store

LOADS = (Load("concurrency", 1), Load("concurrency", 4))
PAGE = """vllm:cache_config_info{{block_size="32",num_gpu_blocks="{blocks}"}} 1.0
vllm:kv_cache_usage_perc{{engine="0"}} 0.5
vllm:num_requests_running{{engine="0"}} 1.0
vllm:num_preemptions_total{{engine="0"}} 0.0
"""


def server_script(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Put something else in the place of the `uncomp` command."""
    script = folder / "uncomp"
    script.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(folder))


@pytest.mark.parametrize(("arm", "disable"), [("full", "1"), ("compressed", "")])
def test_a_server_that_does_not_come_up_shows_its_log(
    arm: str, disable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UNCOMP_DISABLE", raising=False)
    server_script(tmp_path, monkeypatch, 'echo "off: [$UNCOMP_DISABLE]"; exit 3')
    servers = Servers("m", {"keep": 0.5})
    with (
        pytest.raises(ServerError, match=rf"(?s)ended \(status 3\).*off: \[{disable}\]"),
        servers.open(arm, tmp_path / "log"),
    ):
        pass


def test_children_of_a_server_end_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a child that ignores what ends its parent
    body = f"(trap '' TERM; sleep 600) &\necho $! > {tmp_path}/child\nexec sleep 600"
    server_script(tmp_path, monkeypatch, body)
    monkeypatch.setattr("uncomp.cli.server.Server._wait", lambda _: wait_for(tmp_path / "child"))
    monkeypatch.setattr("uncomp.eval.bench.serve_servers.PATIENCE", 0.2)
    with Servers("m", {"keep": 0.5}).open("full", tmp_path / "log") as target:
        child = psutil.Process(int((tmp_path / "child").read_text()))
        target.check()
        assert child.is_running()
    child.wait(timeout=5)


def wait_for(path: Path) -> None:
    while not (path.exists() and path.read_text().strip()):
        time.sleep(0.01)


@dataclasses.dataclass
class World:
    """Servers and a client that only write down what happens."""

    folder: Path
    events: list[str] = dataclasses.field(default_factory=list)
    fail_at: str = ""
    blocks: dict[str, int] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def open(self, _: Servers, arm: str, log: Path) -> Iterator[Target]:
        self.events.append(arm)
        yield Target(f"http://{arm}", 1.0)
        self.events.append("end")

    def fetch(self, url: str) -> str:
        arm = url.removeprefix("http://").split("/")[0]
        return PAGE.format(blocks=self.blocks.get(arm, 100))

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        argv = order["argv"]
        level = argv[argv.index("--max-concurrency") + 1]
        kind = "warm" if "--num-prompts 2 " in " ".join(argv) else f"load {level}"
        self.events.append(kind)
        if self.events[-1] == self.fail_at:
            raise ServerError("the server ended during the load")
        time.sleep(0.02)
        return {
            "duration": 0.02, "completed": 8, "failed": 0, "output_throughput": 1.0,
            "total_token_throughput": 1.0, "request_throughput": 1.0, "total_output_tokens": 8,
            "output_lens": [128] * 8, "start_times": [time.perf_counter() - 0.02] * 8,
            "latencies": [0.02] * 8, "errors": [""] * 8,
            **{f"p{p}_{n}_ms": 1.0 for n in ("ttft", "tpot", "itl") for p in (50, 90, 99)},
        }  # fmt: skip


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    monkeypatch.setattr(Servers, "open", lambda *args: made.open(*args))
    monkeypatch.setattr(serve, "fetch", made.fetch)
    monkeypatch.setattr(serve, "Client", lambda *_: made)
    monkeypatch.setattr(serve.serve_energy, "find", lambda: (None, "not readable"))
    monkeypatch.setattr(serve, "machine", lambda: {"cpu": "x"})
    return made


def bench(world: World, said: list[str] | None = None) -> serve.Bench:
    plan = Plan(SHAPES["long-prompt"], LOADS, requests=8)
    store = Store(world.folder, "s", {})
    store.claim(force=False)
    return serve.Bench(
        Servers("m", {"keep": 0.5}), Traffic(plan, "m"), store, Clock(plan, 1e3, 10, 60), 0.001,
        60, (said if said is not None else []).append,
    )  # fmt: skip


BOTH = ["warm", "load 1", "load 4", "end"]


def test_course(world: World) -> None:
    said: list[str] = []
    assert bench(world, said).run()
    arms = ["full", "compressed", "compressed", "full"]
    assert world.events == [event for arm in arms for event in (arm, *BOTH)]
    assert "8 completed, 0 failed" in said[-1]
    assert said[-1].endswith("(about 0 s left)")
    assert len(re.findall(r"about \d+ (?:s|min) left", "\n".join(said))) == 4 + 8


def test_a_run_that_failed_goes_on_where_it_was(world: World) -> None:
    world.fail_at = "load 4"
    with pytest.raises(ServerError, match="during the load"):
        bench(world).run()
    assert world.events == ["full", "warm", "load 1", "load 4"]
    world.events.clear()
    world.fail_at = ""
    assert bench(world).run()
    assert world.events[:4] == ["full", "warm", "load 4", "end"]
    assert world.events.count("load 1") == 3
    world.events.clear()
    assert bench(world).run()
    assert world.events == []


def test_sessions_stop_in_between(world: World) -> None:
    assert not bench(world).run(1)
    assert world.events == ["full", *BOTH]
    assert bench(world).run(3)


def test_pools_may_differ_by_a_remainder(world: World) -> None:
    world.blocks = {"full": 100, "compressed": 102}
    assert bench(world).run()


def test_pools_that_differ_by_more_than_two_blocks(world: World) -> None:
    world.blocks = {"full": 100, "compressed": 103}
    with pytest.raises(ServerError, match=r"3264 tokens, the full one had 3168.*--pool-bytes"):
        bench(world).run()
