"""Environment variables: the only place that reads ``os.environ`` for settings.

======================  ==========================================================================
Variable                Meaning
======================  ==========================================================================
``UNCOMP_DISABLE``      ``1``/``true``/``yes``/``on``: compression is off whatever the flags say.
``UNCOMP_CACHE``        Folder for the demo model (default ``~/.cache/uncomp``).
``UNCOMP_METRICS_DIR``  Folder of the counter files that the engine process shares with the API
                        server (default: ``uncomp-metrics-<uid>`` in the temporary folder).
``UNCOMP_INSTANCE``     Set by uncomp itself for API servers that run beside the engine process:
                        which engine's counters they show.
======================  ==========================================================================

Also read, and documented by their owners: ``VLLM_PLUGINS``, ``PROMETHEUS_MULTIPROC_DIR``.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"", "0", "false", "no", "off"}


def disabled() -> bool:
    """Whether the kill switch ``UNCOMP_DISABLE`` is set.

    Raises:
        ValueError: for a value that is neither true nor false; guessing either way would be unsafe.
    """
    value = os.environ.get("UNCOMP_DISABLE", "").strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ValueError(
        f"UNCOMP_DISABLE={value!r}: use one of {sorted(_TRUE)} to switch compression off, "
        f"or unset it"
    )


def cache_dir() -> Path:
    """Folder for files that are made once and reused (the demo model)."""
    return Path(os.environ.get("UNCOMP_CACHE") or Path.home() / ".cache" / "uncomp")


def metrics_dir() -> Path:
    """Folder of the counter files; engine and API server of one server must agree on it."""
    default = Path(tempfile.gettempdir()) / f"uncomp-metrics-{os.getuid()}"
    return Path(os.environ.get("UNCOMP_METRICS_DIR") or default)


def vllm_plugins() -> list[str] | None:
    """The plugins that vLLM may load (its variable ``VLLM_PLUGINS``); ``None`` = all."""
    value = os.environ.get("VLLM_PLUGINS")
    return None if value is None else [name.strip() for name in value.split(",")]


def publish_instance(instance_id: str) -> None:
    """Tell child processes which engine's counters to show."""
    os.environ["UNCOMP_INSTANCE"] = instance_id


def published_instance() -> str | None:
    """The engine that the parent process named with :func:`publish_instance`."""
    return os.environ.get("UNCOMP_INSTANCE")


def prometheus_shared() -> bool:
    """Whether several API servers share their metrics (vLLM and prometheus set this)."""
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ
