"""Switch compression on when a configuration with uncomp settings is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from uncomp.patches.patch import Patch


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from uncomp.engine import activate

        # Before vLLM resolves its own defaults.
        activate.prepare_arguments(self)
        config = original(self, *args, **kwargs)
        activate.activate(config)
        return config

    return create_engine_config


PATCH = Patch(
    name="engine-config",
    module="vllm.engine.arg_utils",
    symbol="EngineArgs.create_engine_config",
    parameters=("self",),
    why="`vllm serve --additional-config` and `LLM(additional_config=...)` must be enough to "
    "switch compression on; vLLM has no hook between parsing arguments and starting the engine "
    "that an out-of-tree plugin on the built-in platforms can use.",
    upstream="none: platforms have check_and_update_config, plugins have nothing like it yet",
    remove_when="vLLM calls general plugins with the finished VllmConfig",
    wrap=_wrap,
)
