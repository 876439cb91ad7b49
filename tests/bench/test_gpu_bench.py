"""The GPU benchmark as far as it goes without one: a dry run, its rows, what it asks of engines."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import pytest

from uncomp.eval.bench import rows
from uncomp.eval.bench.gpu_load import tokens
from uncomp.eval.bench.gpu_scenarios import DRY, REAL, Arms

KERNELS = (
    "gram",
    "entropy",
    "window scores",
    "selection",
    "compaction",
    "decode",
    "record",
    "graph of record and decode",
    "compaction by the engine",
    "compaction where layers share",
)
STAGES = (
    "Gram",
    "covariance",
    "entropy",
    "window scores",
    "limits",
    "pooling",
    "shares",
    "choice",
    "moving",
)


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: the interpreter is chosen when Triton is imported."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600
    )


def test_dry_run_reports_everything() -> None:
    done = run("import sys; from uncomp.eval.bench import gpu; sys.exit(gpu.main(['--dry-run']))")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for kernel in KERNELS:
        checked = [line for line in lines if f"| {kernel}: " in line]
        assert checked, kernel
        assert all(line.endswith("| ok |") for line in checked)
    for stage in STAGES:
        assert f"stage {stage} |" in done.stdout
    for wanted in (
        "bandwidth",
        "best tiling",
        "share of the prefill",
        "eigvalsh: time",
        "fp8",
        "layers share",
    ):
        assert wanted in done.stdout
    assert "vllm" not in done.stderr


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        ("gpu_checks.compact = lambda *_: None", "compaction: different bytes"),
        ("gpu_checks.decode = lambda *a, **_: a[4].zero_()", "decode: relative error"),
        ("gpu_checks.record = lambda *_: 1 / 0", "record: ZeroDivisionError"),
    ],
)
def test_a_wrong_kernel_ends_the_run(broken: str, found: str) -> None:
    code = f"""
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
from uncomp.eval.bench import gpu, gpu_checks
{broken}
checks = {{name: getattr(gpu_checks, name) for name in dir(gpu_checks)}}
one = "check_" + {found!r}.split(":")[0].replace("compaction", "compact")
gpu_checks.CHECKS = [checks[one]]
sys.exit(gpu.main(["--dry-run"]))
"""
    done = run(code)
    assert done.returncode == 1, done.stderr
    assert f"{found} | " in done.stdout
    assert "| above |" in done.stdout
    assert "nothing is timed" in done.stderr


def test_without_a_gpu_it_says_so() -> None:
    done = run("import sys; from uncomp.eval.bench import gpu; sys.exit(gpu.main([]))")
    assert done.returncode == 2
    assert "--dry-run" in done.stderr


def test_checks_and_kernels_need_no_vllm() -> None:
    code = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.modules["vllm"] = None
from uncomp.eval.bench import gpu, gpu_checks, gpu_kernels, gpu_scenarios
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_rows_of_other_settings_stay(tmp_path) -> None:
    path = tmp_path / "gpu.csv"
    first = [rows.judge("gpu", name, "time", "s", [1.0]) for name in ("a", "b")]
    rows.merge(first, path, {"gpu": "one"})
    rows.merge([rows.judge("gpu", "b", "time", "s", [2.0, 4.0])], path, {"gpu": "two", "more": "x"})
    with open(path, newline="") as file:
        found = {r["setting"]: r for r in csv.DictReader(file)}
    assert found["a"]["value"] == "1.0"
    assert found["a"]["gpu"] == "one"
    assert found["a"]["more"] == ""
    assert found["b"]["value"] == "3.0"
    assert found["b"]["gpu"] == "two"


def test_bars() -> None:
    def verdict(value: float, **bar: float) -> str:
        return rows.judge("gpu", "s", "m", "", [value], **bar).verdict

    assert verdict(6.4, least=6.4) == "ok"
    assert verdict(6.3, least=6.4) == "below"
    assert verdict(2.1, most=2.0) == "above"
    nan = float("nan")
    assert verdict(nan, most=2.0) == "above"
    assert verdict(nan, least=2.0) == "below"
    assert rows.missed([rows.judge("gpu", "s", "m", "", [nan], most=0.0)])


def test_started_requests_fill_the_pool() -> None:
    arms = Arms(REAL, "model")
    full = arms.generating(None, REAL.pool)["runs"][0]
    kept = arms.generating(384, REAL.pool)["runs"][0]
    # 20 GiB hold 163,840 tokens: 26 requests of 6,144 on average, 256 of 384 + 256.
    assert (full["started"], full["written"]) == (26, "prompt")
    assert (kept["started"], kept["written"]) == (256, "output")
    assert REAL.token_bytes() == 128 << 10
    stock = arms.generating(None, REAL.pool)
    assert stock["env"]["VLLM_PLUGINS"] == ""
    assert "additional_config" not in stock["engine"]


def test_no_prompt_is_another_ones() -> None:
    assert tokens(1000, 50, 1) == tokens(1000, 50, 1)
    assert tokens(1000, 50, 1) != tokens(1000, 50, 2)
    assert DRY.token_bytes() == 1024
