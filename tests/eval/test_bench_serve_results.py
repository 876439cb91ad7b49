"""From readings and client results to numbers, rows, tables and files."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest

from uncomp.eval.bench import serve_energy, serve_records, serve_rows
from uncomp.eval.bench.rows import missed
from uncomp.eval.bench.serve_measure import in_flight, measured
from uncomp.eval.bench.serve_plan import Load, Session
from uncomp.eval.bench.serve_records import Measured, Pool
from uncomp.eval.bench.serve_sampling import (
    Sampler,
    Scrape,
    columns,
    differences,
    pool,
    read_metrics,
)
from uncomp.eval.bench.serve_store import Store, Taken

PAGE = """# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 99.0
vllm:num_preemptions_total{engine="0",model_name="m"} 4.0
vllm:cache_config_info{block_size="32",engine="0",kv_cache_memory_bytes="145000000",num_gpu_blocks="101"} 1.0
vllm:time_to_first_token_seconds_bucket{le="0.5"} 7.0
uncomp:compactions_total{engine="0",model_name="m"} 11.0
"""  # noqa: E501
FULL, COMPRESSED = "full", "compressed keep 0.25"
LABELS = {"full": FULL, "compressed": COMPRESSED}


def test_metrics_of_two_engines() -> None:
    values, labels = read_metrics(PAGE)
    assert values == {
        "vllm:kv_cache_usage_perc": 0.5,
        "vllm:num_requests_running": 5,
        "vllm:num_requests_waiting": 0,
        "vllm:num_preemptions_total": 4,
        "uncomp:compactions_total": 11,
    }
    assert labels["num_gpu_blocks"] == "101"


def test_pool_is_read_from_the_server() -> None:
    found = pool(PAGE, None)
    assert (found.tokens, found.block_size, found.bytes) == (3200, 32, 145e6)
    assert found.usable_bytes == pytest.approx(145e6 * 100 / 101)
    assert pool(PAGE, 7).bytes == 7
    unknown = pool(PAGE.replace("145000000", "None"), None)
    assert unknown.bytes is unknown.usable_bytes is None
    with pytest.raises(ValueError, match="is this vLLM"):
        pool("other_metric 1\n", None)


def scrape(at: float, held: float, preemptions: float, joules: float | None = None) -> Scrape:
    names = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_preemptions_total")
    return Scrape(at, dict(zip(names, (held, 2.0, preemptions), strict=True)), joules)


SCRAPES = [
    scrape(9, 0.0, 3, 100),
    scrape(11, 0.2, 3, 140),
    scrape(13, 0.6, 4, 160),
    scrape(15, 0.0, 5, 200),
]


def test_only_readings_of_the_load_count() -> None:
    assert columns(SCRAPES, 10, 14)["seconds"] == [1, 3]
    assert columns(SCRAPES, 10, 14)["held"] == [0.2, 0.6]
    # 100 + 20 at second 10, 160 + 20 at second 14: even between two readings
    assert differences(SCRAPES, 10, 14) == {"preemptions": 2, "joules": 60}


def test_what_cannot_be_read_is_missing_not_zero() -> None:
    bare = [Scrape(s.at, {"vllm:kv_cache_usage_perc": 0.1}, None) for s in SCRAPES]
    assert differences(bare, 10, 14) == {}
    assert differences([], 10, 14) == {}


def test_sampler_counts_failed_readings() -> None:
    pages = iter([PAGE, None, PAGE])

    def read() -> str:
        page = next(pages, PAGE)
        if page is None:
            raise OSError("connection refused")
        return page

    with Sampler(read, 0.001, serve_energy.Meter("test", lambda: 5.0)) as sampler:
        while len(sampler.scrapes) < 3:
            pass
    assert sampler.missed == 1
    assert sampler.scrapes[0].joules == 5.0


def result(**changes: object) -> dict[str, object]:
    base: dict[str, object] = {
        "duration": 4.0, "completed": 3, "failed": 1,
        "output_throughput": 6.0, "total_token_throughput": 300.0, "request_throughput": 0.75,
        "total_output_tokens": 24, "output_lens": [8, 8, 8, 0],
        "start_times": [10.0, 10.0, 12.0, 13.0], "latencies": [2.0, 3.0, 2.0, 0.0],
        "errors": ["", "", "", "Bad Request"],
        **{f"p{p}_{n}_ms": float(p) for n in ("ttft", "tpot", "itl") for p in (50, 90, 99)},
    }  # fmt: skip
    return {**base, **changes}


def one(arm: str = "full", number: int = 1, **changes: object) -> Measured:
    session = Session(arm, number, (Load("concurrency", 2),))
    return measured(
        session, session.loads[0], result(**changes), SCRAPES, 0, [8], Pool(101, 32, 101e6),
        {"commit": f"c{number}", "cpu": "x"},
    )  # fmt: skip


def test_numbers_of_a_load() -> None:
    found = one()
    assert found.metrics == pytest.approx({
        "output_throughput": 6, "total_throughput": 300, "request_throughput": 0.75,
        "in_flight_peak": 2, "completed": 3, "failed": 1, "other_length": 0,
        "pool_tokens": 3200, "block_size": 32,
        **{f"{n}_p{p}": p for n in ("ttft", "tpot", "itl") for p in (50, 90, 99)},
        "held_peak_share": 60, "held_mean_share": 40, "held_peak": 60, "held_mean": 40,
        "running_peak": 2, "running_mean": 2, "preemptions": 2, "joules_per_token": 60 / 24,
    })  # fmt: skip
    assert found.errors == ("Bad Request",)
    held = found.held()
    assert held is not None
    assert held.seconds == (1, 3)
    assert held.bytes == pytest.approx((20e6, 60e6))


def test_short_answers_are_counted() -> None:
    assert one(output_lens=[8, 7, 8, 0]).metrics["other_length"] == 1


def test_nothing_completed_gives_no_latencies() -> None:
    found = one(completed=0, failed=4, output_lens=[0] * 4, latencies=[0.0] * 4,
                total_output_tokens=0, output_throughput=0.0)  # fmt: skip
    assert found.metrics["failed"] == 4
    assert not [name for name in found.metrics if name.startswith(("ttft", "tpot", "itl", "joul"))]


def test_requests_in_flight_are_exact() -> None:
    # one after the other within a second: never two at once
    times = {"start_times": [0.0, 0.2, 0.4], "latencies": [0.2, 0.2, 0.2]}
    assert in_flight(times) == 1
    assert in_flight({"start_times": [0.0, 0.1], "latencies": [0.2, 0.2]}) == 2


def four() -> list[Measured]:
    return [
        one("full", 1, output_throughput=10.0, failed=0),
        one("compressed", 1, output_throughput=20.0, failed=0),
        one("compressed", 2, output_throughput=24.0, failed=0),
        one("full", 2, output_throughput=8.0, failed=0),
    ]


def test_rows_have_median_spread_and_ratio() -> None:
    found = {(r.setting, r.metric): r for r in serve_rows.rows(four(), "t", LABELS)}
    row = found[f"t, concurrency 2, {FULL}", "output throughput"]
    assert (row.value, row.repeats, row.unit) == (9, 2, "tokens/s")
    assert (row.low, row.high) == pytest.approx((8.4, 9.6))
    ratio = found[f"t, concurrency 2, {COMPRESSED} over {FULL}", "output throughput"]
    assert ratio.value == 2.5  # of rounds: 20 / 10 and 24 / 8
    assert not missed(list(found.values()))
    assert (f"t, concurrency 2, {FULL}", "compactions") not in found


def test_a_failed_request_misses_the_bar() -> None:
    assert missed(serve_rows.rows([one()], "t", LABELS))


def test_table_and_points() -> None:
    table = serve_rows.table(four(), LABELS)
    assert "| concurrency 2 | output throughput | 9 tokens/s (8.4 to 9.6) | 22 tokens/s" in table
    full, compressed = serve_rows.points(four())
    assert (full.arm, compressed.arm, full.mode, full.level) == (
        "full", "compressed", "concurrency", 2,
    )  # fmt: skip
    assert compressed.metrics["output_throughput"] == pytest.approx((22, 20.8, 23.2))


def test_large_numbers_are_written_out() -> None:
    assert "| TTFT p50 | 10151 ms |" in serve_rows.table([one(p50_ttft_ms=10150.6)], LABELS)


def test_results_survive_a_file(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    record = one()
    serve_records.save(record, path)
    assert serve_records.load(path) == record
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="remove it"):
        serve_records.load(path)


def test_a_run_is_taken_up_and_never_overwritten(tmp_path: Path) -> None:
    store = Store(tmp_path, "s", {"seed": 0, "pool": (1, 2)})
    store.claim(force=False)
    session = Session("full", 1, (Load("concurrency", 2),))
    store.put(session, session.loads[0], one())
    again = Store(tmp_path, "s", {"seed": 0, "pool": (1, 2)})
    again.claim(force=False)
    assert again.has(session, session.loads[0])
    other = Store(tmp_path, "s", {"seed": 1, "pool": (1, 2)})
    with pytest.raises(Taken, match=r"seed was 0, is 1.*--force"):
        other.claim(force=False)
    assert store.has(session, session.loads[0])
    other.claim(force=True)
    assert not other.has(session, session.loads[0])


def test_rows_of_others_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("mine\n", encoding="utf-8")
    with pytest.raises(Taken, match="exists"):
        Store(tmp_path, "s", {}).claim(force=False)
    assert (tmp_path / "s.csv").read_text(encoding="utf-8") == "mine\n"


def test_published_files(tmp_path: Path) -> None:
    store = Store(tmp_path, "s", {"seed": 0, "model": "m", "pool_bytes": 5})
    store.claim(force=False)
    store.publish(four(), "t", LABELS)
    store.publish(four(), "t", LABELS)  # again: the same rows, once
    with open(tmp_path / "s.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len({(r["setting"], r["metric"]) for r in lines}) == len(lines) > 40
    assert {(r["commit"], r["model"], r["pool_bytes"]) for r in lines} == {("c1 + c2", "m", "5")}
    data = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    series = [serve_records.HeldSeries(**held) for held in data["held"]]
    assert [s.round for s in series] == [1, 1, 2, 2]
    points = [serve_records.LoadPoint(**point) for point in data["points"]]
    assert [p.arm for p in points] == ["full", "compressed"]
    assert math.isclose(points[0].metrics["output_throughput"][0], 9)
    assert {f.name for f in dataclasses.fields(series[0])} >= {"arm", "seconds", "bytes"}


def zone(folder: Path, name: str, energy: int, span: int = 1000) -> Path:
    path = folder / name
    path.mkdir()
    (path / "energy_uj").write_text(f"{energy}\n", encoding="utf-8")
    (path / "max_energy_range_uj").write_text(f"{span}\n", encoding="utf-8")
    return path


def test_rapl_packages_wrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_energy, "_pynvml", lambda: None)
    package = zone(tmp_path, "intel-rapl:0", 990)
    zone(tmp_path, "intel-rapl:0:0", 5)  # a part of the package
    meter, source = serve_energy.find({}, tmp_path)
    assert meter is not None
    assert source == "RAPL, 1 CPU package"
    (package / "energy_uj").write_text("20\n", encoding="utf-8")
    assert meter.joules() == pytest.approx(30e-6)


def test_no_energy_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_energy, "_pynvml", lambda: None)
    assert serve_energy.find({}, tmp_path) == (
        None,
        "not readable (no pynvml; RAPL: not there)",
    )


class FakeNvml:
    """Two GPUs, of 3 and 5 J."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, name: str) -> int:
        if name != "GPU-b":
            raise self.NVMLError("not found")
        return 1

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        return (3000, 5000)[handle]


@pytest.mark.parametrize(
    ("visible", "joules"), [(None, 8), ("1", 5), ("0,1", 8), ("GPU-b", 5)], ids=str
)
def test_energy_of_the_visible_gpus(
    visible: str | None, joules: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_energy, "_pynvml", FakeNvml)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    meter, _ = serve_energy.find(environment)
    assert meter is not None
    assert meter.joules() == joules
