"""Answer bad per-request settings with status 400 instead of serving something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from uncomp.patches.patch import Patch


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        from uncomp.engine.admission import check_request

        request = original(self, *args, **kwargs)
        check_request(self.vllm_config, request)
        return request

    return process_inputs


PATCH = Patch(
    name="request-validation",
    module="vllm.v1.engine.input_processor",
    symbol="InputProcessor.process_inputs",
    parameters=("self", "request_id", "prompt", "params"),
    why="extra_args are passed through unchecked. Platforms can validate a request, logits "
    "processors can validate its parameters, but a custom logits processor switches off other "
    "engine features, and neither sees the length of the prompt.",
    upstream="none: a request-validation hook for plugins has not been proposed",
    remove_when="vLLM lets a plugin validate SamplingParams.extra_args at admission",
    wrap=_wrap,
)
