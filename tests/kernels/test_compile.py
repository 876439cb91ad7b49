"""Every kernel variant compiles for every target, fits its shared memory and does not spill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from uncomp.kernels.compile import FOLDERS, TARGETS, Report

Reports = Callable[[str], list[dict]]


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: here `TRITON_INTERPRET` makes kernels uncompilable."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="session")
def reports(tmp_path_factory):
    """What the compilers say about a folder's kernels; two folders at a time."""
    cwd = tmp_path_factory.mktemp("compile")
    with ThreadPoolExecutor(2) as pool:
        started: dict[str, Future] = {
            folder: pool.submit(
                run, ["-m", "uncomp.kernels.compile", "--json", "--kernel", folder], cwd
            )
            for folder in FOLDERS
        }

        def of(folder: str) -> list[dict]:
            done = started[folder].result()
            assert done.stdout, done.stderr[-2000:]
            return json.loads(done.stdout)

        yield of
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_variants_compile_and_fit(reports: Reports, folder: str, target: str):
    found = [report for report in reports(folder) if report["target"] == target]
    assert any(report["default"] for report in found), f"no default variant for {target}"
    problems = [f"{r['variant']} ({r['config']}): {r['problem']}" for r in found if r["problem"]]
    assert not problems, "\n".join(problems)


def test_other_than_default_configurations_may_spill():
    report = Report("product", "M=128", "sm_90", default=True, spills=8)
    assert report.problem == "the default configuration spills 8 bytes"
    assert replace(report, default=False).problem == ""
    assert replace(report, default=False, error="broken").problem == "broken"


def test_every_target_and_kernel_is_checked(root: Path):
    assert set(TARGETS) == {"sm_80", "sm_90", "sm_100", "gfx942"}
    folders = {path.parent.name for path in (root / "kernels").glob("*/variants.py")}
    assert folders == set(FOLDERS) == {p.parent.name for p in root.glob("kernels/*/launch.py")}


CHECKED = """
import json
import triton
import triton.language as tl
from uncomp.kernels.compile import TARGETS, compile_variant
from uncomp.kernels.variant import Config, Variant


@triton.jit
def product(a, b, out, steps, SIZE: tl.constexpr, K: tl.constexpr):
    line, inner = tl.arange(0, SIZE), tl.arange(0, K)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(steps):
        # Only loads known to be aligned are pipelined.
        left = tl.multiple_of(a + step * SIZE * K, 16)
        right = tl.multiple_of(b + step * SIZE * K, 16)
        left = tl.load(left + line[:, None] * K + inner[None, :])
        right = tl.load(right + inner[:, None] * SIZE + line[None, :])
        total = tl.dot(left, right, total)
    tl.store(out + line[:, None] * SIZE + line[None, :], total)


@triton.jit
def centre(values, SIZE: tl.constexpr):
    at = values + tl.arange(0, SIZE)
    held = tl.load(at)
    tl.store(at, held - tl.max(held, axis=0))


def report(target, config, kernel=product, signature=None):
    pointers = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "steps": "i32"}
    variant = Variant("made", kernel, signature or pointers, {}, config)
    found = compile_variant(variant, target)
    return {"problem": found.problem, "shared": found.shared, "registers": found.registers}


if __name__ == "__main__":
    found = {}
    for target in TARGETS:
        amd = target.startswith("gfx")
        sane = Config({"SIZE": 32, "K": 32}, 4, 2)
        large = Config({"SIZE": 32, "K": 512}, 4, 3 if amd else 5)
        # 1024 threads of 128 values: more than the registers that so many threads can have.
        crowded = Config({"SIZE": 2**17}, 16 if amd else 32, 1)
        found[target] = {
            "sane": report(target, sane),
            "large": report(target, large),
            "spilling": report(target, crowded, centre, {"values": "*fp32"}),
            "misfit": report(target, sane, signature={"a": "*bf16"}),
            "broken": report(target, Config({"SIZE": 48, "K": 32}, 4, 2)),
        }
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory) -> dict[str, dict[str, dict]]:
    """Reports of variants made to fail, by target."""
    script = tmp_path_factory.mktemp("checked") / "checked.py"
    script.write_text(CHECKED)
    done = run([str(script)], script.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", TARGETS)
def test_bad_variants_are_reported(verdicts, target: str):
    found = verdicts[target]
    assert found["sane"]["problem"] == ""
    assert 0 < found["sane"]["registers"] < 256
    assert 0 < found["sane"]["shared"] < 2**16
    assert "bytes of shared memory" in found["large"]["problem"]
    assert "the default configuration spills" in found["spilling"]["problem"]
    assert "do not fit the kernel: ['b', 'out', 'steps']" in found["misfit"]["problem"]
    assert "CompilationError" in found["broken"]["problem"]
