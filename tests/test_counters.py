"""The counter file between engine and API server, and the metrics made from it."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette

from uncomp import envs
from uncomp.engine import metrics
from uncomp.engine.counters import Counters, counter_file, open_counters


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNCOMP_METRICS_DIR", str(tmp_path))
    monkeypatch.delenv("UNCOMP_INSTANCE", raising=False)
    return tmp_path


def order(generation: int = 1) -> SimpleNamespace:
    return SimpleNamespace(generation=generation)


def receipt(seen: int, kept: int) -> SimpleNamespace:
    return SimpleNamespace(tokens_seen=seen, tokens_kept=kept, score_seconds=0.5, move_seconds=0.25)


def test_reader_sees_what_the_engine_counts() -> None:
    engine = Counters(counter_file("a"))
    (reader,) = open_counters("a")
    engine.compacted(order(), receipt(1000, 250), freed=24)
    engine.compacted(order(2), receipt(400, 300), freed=3)
    engine.refused("opted_out")
    seen = reader.snapshot()
    assert (seen["compactions"], seen["requests_compressed"], seen["blocks_freed"]) == (2, 1, 27)
    assert (seen["tokens_seen"], seen["tokens_kept"]) == (1400, 550)
    assert (seen["kept_ratio_le_0.25"], seen["kept_ratio_le_0.75"]) == (1, 2)
    assert seen["refused_opted_out"] == 1
    assert seen["engine_pid"] == os.getpid()


def test_engines_are_told_apart() -> None:
    engines = [Counters(counter_file("a", rank)) for rank in range(11)]
    Counters(counter_file("ab"))
    assert [counters.rank for counters in open_counters("a")] == list(range(11))
    for engine in engines:
        engine.remove()
    assert open_counters("a") == []


def test_files_of_killed_engines_are_removed_and_others_are_not() -> None:
    code = (
        "import signal; from uncomp.engine.counters import Counters, counter_file\n"
        "counters = Counters(counter_file('killed'))\n"
        "print(counters.path, flush=True); signal.pause()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    path = Path(process.stdout.readline().strip())
    alive = Counters(counter_file("alive"))
    assert path.is_file(), "a new engine removed the file of a living one"
    process.kill()
    process.communicate()
    Counters(counter_file("next"))
    assert not path.is_file()
    assert alive.path.is_file()


def configuration(instance: str, rank: int = 0, count: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        instance_id=instance,
        parallel_config=SimpleNamespace(_api_process_rank=rank, _api_process_count=count),
        model_config=SimpleNamespace(served_model_name="model"),
    )


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> metrics.UncompCollector:
    fresh = metrics.UncompCollector()
    monkeypatch.setattr(metrics, "_collector", fresh)
    monkeypatch.setattr(metrics, "REGISTRY", CollectorRegistry())
    return fresh


def test_metrics_follow_the_counters(collector: metrics.UncompCollector) -> None:
    metrics.watch(configuration("a"))
    engine = Counters(counter_file("a", 1))
    engine["blocks_held"], engine["block_bytes"] = 3, 100
    engine.compacted(order(), receipt(1000, 250), freed=24)
    engine.refused("no_free_block")
    text = generate_latest(metrics.REGISTRY).decode()
    labels = 'engine="1",model_name="model"'
    assert f"uncomp:blocks_freed_total{{{labels}}} 24.0" in text
    assert f"uncomp:kv_bytes_held{{{labels}}} 300.0" in text
    assert f'uncomp:refusals_total{{{labels},reason="no_free_block"}} 1.0' in text
    assert 'uncomp:kept_ratio_bucket{engine="1",le="0.2",model_name="model"} 0.0' in text
    assert 'uncomp:kept_ratio_bucket{engine="1",le="+Inf",model_name="model"} 1.0' in text


def test_an_engine_that_has_not_counted_yet_shows_nothing(
    collector: metrics.UncompCollector,
) -> None:
    metrics.watch(configuration("a"))
    metrics.watch(configuration("b"))
    assert 'engine="' not in generate_latest(metrics.REGISTRY).decode()


def test_api_servers_beside_the_engine_show_the_engine_of_their_parent(
    collector: metrics.UncompCollector, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("UNCOMP_INSTANCE", "")  # restored afterwards
    metrics.watch(configuration("engine", rank=-1, count=2))
    assert envs.published_instance() == "engine"
    collector.engines.clear()
    monkeypatch.setattr(metrics, "REGISTRY", CollectorRegistry())
    metrics.watch(configuration("own", rank=1, count=2))
    assert list(collector.engines) == ["engine"]
    Counters(counter_file("engine")).add("compactions")
    app = Starlette()
    metrics.serve_shared(app)
    assert app.router.routes == []  # one API server: vLLM's own endpoint shows the registry
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
    metrics.serve_shared(app)
    answer = app.router.routes[0].endpoint(None)
    assert b"uncomp:compactions_total{" in answer.body
