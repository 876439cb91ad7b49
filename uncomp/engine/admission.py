"""Checks a request's compression settings in the front end, where an error becomes a status 400."""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm.exceptions import VLLMValidationError

from uncomp.config import UncompConfig
from uncomp.engine.planner import NO_TOKENIZER
from uncomp.engine.settings import requested
from uncomp.request import RequestError, RequestSettings, request_settings
from uncomp.request_policy import needs_words

#: settings of the engine that this front end was started for; see ``activate``
_active: UncompConfig | None = None


class Rejected(VLLMValidationError, RequestError):
    """A bad request, under the type that vLLM's servers answer with status 400."""


def watch(config: UncompConfig) -> None:
    """Check the form of every request of this process from now on."""
    global _active
    # What depends on the length of the prompt is checked later, when it is known.
    overrides = "forbid" if config.overrides == "forbid" else "allow"
    _active = dataclasses.replace(config, overrides=overrides, min_keep=0.0)


def check_form(extra_args: dict[str, Any] | None) -> None:
    """Check everything that can be known without the prompt.

    Raises:
        Rejected: says which setting is wrong and what is allowed.
    """
    if _active is not None:
        _check(extra_args, _active, 0)


def check_request(vllm_config: Any, request: Any) -> None:
    """Validate the settings of an ``EngineCoreRequest``.

    Raises:
        Rejected: says which setting is wrong and what is allowed.
    """
    if request.sampling_params is None:
        return
    config = requested(vllm_config)
    if config is None:
        return
    tokens = request.prompt_token_ids
    length = len(tokens) if tokens is not None else len(request.prompt_embeds)
    settings = _check(request.sampling_params.extra_args, config, length)
    if vllm_config.model_config.skip_tokenizer_init and needs_words(settings.own or config):
        raise Rejected(NO_TOKENIZER)


def _check(
    extra_args: dict[str, Any] | None, config: UncompConfig, prompt_tokens: int
) -> RequestSettings:
    try:
        return request_settings(extra_args, config, prompt_tokens)
    except RequestError as error:
        raise Rejected(str(error)) from error
