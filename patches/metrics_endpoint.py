"""Show uncomp's metrics where several API servers share one ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from uncomp.patches.patch import Patch


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def attach_router(app: Any) -> None:
        from uncomp.engine import metrics

        original(app)
        metrics.serve_shared(app)

    return attach_router


PATCH = Patch(
    name="metrics-endpoint",
    module="vllm.entrypoints.serve.instrumentator.metrics",
    symbol="attach_router",
    parameters=("app",),
    why="With --api-server-count above 1, /metrics makes a registry at every request that reads "
    "nothing but prometheus multi-process files, and no collector can be added to it. With one "
    "API server /metrics shows prometheus' global registry and this patch does nothing.",
    upstream="none: stat-logger plugins see vLLM's own statistics only, and no registry",
    remove_when="vLLM lets a plugin add a collector to the registry behind /metrics",
    wrap=_wrap,
)
