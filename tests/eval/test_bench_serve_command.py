"""`uncomp bench serve`: its arguments, what servers and the client get, and one real comparison."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from uncomp.cli import main
from uncomp.eval.bench.serve_client import Client, ClientError, Traffic
from uncomp.eval.bench.serve_plan import SHAPES, Load, Plan
from uncomp.eval.bench.serve_servers import STOCK, Servers, Target, kv_flags
from uncomp.eval.bench.serve_trace import Arrival

URL = "http://127.0.0.1:1"
POOL = ("--pool-bytes", "60000000")


def value(argv: list[str], name: str) -> str:
    assert argv.count(name) == 1
    return argv[argv.index(name) + 1]


def traffic(shape: str = "long-prompt", *loads: Load, trace: tuple[Arrival, ...] = ()) -> Traffic:
    plan = Plan(SHAPES[shape], loads or (Load("concurrency", 4),), trace_requests=len(trace))
    return Traffic(plan, "model", seed=3, trace=trace)


def test_both_arms_get_the_same_requests() -> None:
    load = Load("concurrency", 4)
    one, two = (traffic().order(URL, load)["argv"] for _ in range(2))
    # All but the salt, which keeps the prefix cache of another load out.
    different = {a for a, b in zip(one, two, strict=True) if a != b}
    assert different == {value(one, "--extra-body"), value(one, "--request-id-prefix")}
    assert value(one, "--seed") == "3"
    assert "--ignore-eos" in one
    assert value(one, "--temperature") == "0"
    assert value(one, "--max-concurrency") == "4"
    assert value(one, "--num-prompts") == "16"
    assert value(one, "--random-input-len") == "4096"


def test_warm_up_does_not_use_the_measured_prompts() -> None:
    order = traffic().warm_up(URL)
    assert order is not None
    assert value(order["argv"], "--seed") == "4"
    assert value(order["argv"], "--num-prompts") == "2"


def test_shared_prefixes() -> None:
    argv = traffic("shared-prefix").order(URL, Load("rate", 0.5))["argv"]
    assert value(argv, "--dataset-name") == "prefix_repetition"
    assert value(argv, "--prefix-repetition-prefix-len") == "3584"
    assert value(argv, "--prefix-repetition-suffix-len") == "512"
    assert value(argv, "--request-rate") == "0.5"
    assert int(value(argv, "--num-prompts")) % 4 == 0


def test_a_faster_trace_arrives_earlier() -> None:
    trace = (Arrival(0, "", 5, 2), Arrival(3, "text", 0, 2))
    order = traffic("long-prompt", Load("trace", 2), trace=trace).order(URL, Load("trace", 2))
    assert [r["seconds"] for r in order["trace"]] == [0, 1.5]
    assert value(order["argv"], "--num-prompts") == "2"


def test_settings_become_flags() -> None:
    flags = kv_flags({"keep": 0.25, "policy": "adakv", "relocate": False, "reverse": True})
    assert flags == ["--kv-keep=0.25", "--kv-policy=adakv", "--no-kv-relocate", "--kv-reverse"]


def test_arms_differ_in_the_environment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from uncomp.cli import serve

    for name in ("UNCOMP_DISABLE", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    command = Servers("m", {"keep": 0.25}, ("--max-model-len", "99"), 1000).command()
    on = serve.vllm_arguments(command)
    for name, text in STOCK.items():
        monkeypatch.setenv(name, text)
    off = serve.vllm_arguments(command)
    assert on == [*off, "--additional-config", '{"uncomp": {"keep": 0.25}}']
    assert value(off, "--kv-cache-memory-bytes") == "1000"
    assert "uncomp" not in STOCK["VLLM_PLUGINS"].split(",")


def test_urls_are_used_as_they_are(tmp_path: Path) -> None:
    urls = {"full": "http://a:1/", "compressed": "http://b:2"}
    with Servers("", {}, urls=urls).open("full", tmp_path / "log") as target:
        assert target == Target("http://a:1")


def test_a_client_that_ends_shows_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "client"
    script.write_text("#!/bin/sh\necho no module vllm >&2\nexit 1\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with (
        Client(tmp_path / "log", 60) as client,
        pytest.raises(ClientError, match=r"(?s)the client ended.*no module vllm"),
    ):
        client.run({})


def test_a_client_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "client"
    script.write_text("#!/bin/sh\nexec sleep 600\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with (
        Client(tmp_path / "log", 0.2) as client,
        pytest.raises(ClientError, match="--load-timeout"),
    ):
        client.run({})
    assert client._child.poll() is not None


def test_dry_run_prints_the_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["bench", "serve", "m", "--kv-keep", "0.25", *POOL, "--concurrency", "1,4"]
    assert main([*argv, "--results", str(tmp_path / "r"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "full compressed compressed full" in shown
    assert "concurrency 4" in shown
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--concurrency", "1", *POOL], "--kv-keep RATIO"),
        (["--kv-keep", "2", "--concurrency", "1", *POOL], "keep=2.0"),
        (["--kv-keep", "0.5", "--concurrency", "1"], "--pool-bytes"),
        (["--kv-keep", "0.5", *POOL], "--concurrency, --rate or --trace"),
        (["--full-url", URL, "--concurrency", "1"], "both --full-url and --compressed-url"),
        (["--kv-keep", "0.5", *POOL, "--trace", "missing.jsonl"], "missing.jsonl"),
        (["--kv-keep", "0.5", *POOL, "--rate", "1", "--sessions", "0"], "--sessions"),
        (
            ["--full-url", URL, "--compressed-url", URL, "--rate", "1", "--", "--max-num-seqs"],
            "servers that are started here",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_usage_errors(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "m", *argv, "--dry-run"]) == 2
    assert says in capsys.readouterr().err


def test_a_typo_is_not_handed_to_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "serve", "m", "--kv-keep", "0.5", "--concurency", "1"])
    assert "--concurency" in capsys.readouterr().err


def test_benches_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("serve", "cpu", "gpu"))
    assert main(["bench", "tpu"]) == 2
    assert "serve" in capsys.readouterr().err


@pytest.mark.engine
def test_two_real_servers(
    demo_model: Path, served_dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command; then again, which must find everything done."""
    blocks = 80
    pool = blocks * 32 * 30 * 3 * 2 * 64 * {"bfloat16": 2, "float32": 4}[served_dtype]
    command = [
        str(Path(sys.executable).with_name("uncomp")), "bench", "serve", str(demo_model),
        "--kv-keep", "0.25", "--kv-min-tokens", "64", "--pool-bytes", str(pool),
        "--concurrency", "2",
        "--requests", "2", "--prompt-tokens", "512", "--output-tokens", "16", "--rounds", "1",
        "--interval", "0.05", "--warm-up", "0", "--results", str(tmp_path),
        "--", "--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager",
        "--block-size", "32", "--dtype", served_dtype,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "serve.json").read_text(encoding="utf-8"))
    full, compressed = (point["metrics"] for point in data["points"])
    for metrics in (full, compressed):
        assert metrics["completed"][0] == 2
        assert metrics["failed"][0] == metrics["other_length"][0] == 0
        assert metrics["in_flight_peak"][0] == 2
        assert metrics["output_throughput"][0] > 0
        assert 0 < metrics["ttft_p50"][0] <= metrics["ttft_p99"][0]
    # 16 blocks of prompt and one of output, twice; a quarter of the prompt and one of output
    assert full["held_peak_share"][0] == pytest.approx(100 * 34 / blocks, abs=3)
    assert compressed["compactions"][0] == 2
    assert "compactions" not in full
    # When both prefill neither is compacted: the peak is lower for sure, the end is a quarter.
    assert compressed["held_peak_share"][0] < full["held_peak_share"][0]
    end = {held["arm"]: held["bytes"] for held in data["held"]}
    settled = [share for share in end["compressed"] if share > 0][-1]
    assert settled <= 0.35 * max(end["full"])
    with open(tmp_path / "serve.csv", newline="", encoding="utf-8") as file:
        assert {r["bench"] for r in csv.DictReader(file)} == {"serve"}

    assert main(command[1:]) == 0
    again = capsys.readouterr()
    assert again.out == done.stdout
    assert "server (" in done.stderr
    assert "server (" not in again.err
