"""Answer a streaming request with bad settings with status 400, before the stream opens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from uncomp.patches.patch import Patch


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_optional(*args: Any, **kwargs: Any) -> Any:
        from uncomp.engine.admission import check_form

        params = original(*args, **kwargs)
        check_form(params.extra_args)
        return params

    return from_optional


PATCH = Patch(
    name="early-validation",
    module="vllm.sampling_params",
    symbol="SamplingParams.from_optional",
    parameters=("extra_args",),
    why="the server opens a stream before it hands the request to the engine, where the patch "
    "request-validation looks at it: status 200 and an error event. Sampling parameters are made "
    "before the stream opens.",
    upstream="none: goes with request-validation",
    remove_when="vLLM lets a plugin validate SamplingParams.extra_args at admission",
    wrap=_wrap,
)
