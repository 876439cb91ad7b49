"""Settings of a single request: ``SamplingParams.extra_args`` or ``vllm_xargs`` in the OpenAI API.

==================  ===============================================================================
``kv_compress``     ``true``/``false`` (also 1/0, "on"/"off"): compress this request or not
``kv_keep``         own keep ratio in (0, 1]
``kv_budget``       own budget, tokens per KV head
``kv_protect``      prompt tokens that are never dropped: Python slices, ``"0:200"``, ``"-64:"``,
                    several as a list or separated by commas
``kv_policy``       own policy or preset
``kv_settings``     own settings of the policy, an object or JSON text: ``{"pooling": 7}``
``kv_compact_at``   compress after this many prompt tokens instead of after the whole prompt, before
                    the rest is read (negative: counted from the end)
``kv_prefill_keep`` own fraction of the prompt's tokens that enters the last layers; 1: all of them
``kv_report``       ``true``: the answer says what was kept (``kv_transfer_params.uncomp``)
==================  ===============================================================================
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from uncomp.config import UncompConfig
from uncomp.request_policy import own_config

KEYS = (
    "kv_compress",
    "kv_keep",
    "kv_budget",
    "kv_protect",
    "kv_policy",
    "kv_settings",
    "kv_compact_at",
    "kv_prefill_keep",
    "kv_report",
)
_SLICE = re.compile(r"^\s*(-?\d+)?\s*:\s*(-?\d+)?\s*$")
_SWITCH = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}


class RequestError(ValueError):
    """A request asked for something that is not allowed; the API answers it with status 400."""


@dataclass(frozen=True)
class RequestSettings:
    """What applies to one request after its own settings are merged with the server's.

    Attributes:
        protect: half-open prompt spans ``(start, end)``, resolved, sorted and disjoint.
        own: settings of the request's own policy; ``None`` = the server's.
        report: whether the answer says what was kept.
        compact_at: prompt tokens after which to compress first, fewer than all of them; ``None`` =
            after all of them.
        prefill_keep: fraction of the prompt's tokens that enters the last stage of layers; 1 = all.
    """

    compress: bool
    keep: float | None
    budget: int | None
    protect: tuple[tuple[int, int], ...] = ()
    own: UncompConfig | None = None
    report: bool = False
    compact_at: int | None = None
    prefill_keep: float = 1.0

    @property
    def protected_tokens(self) -> int:
        return sum(end - start for start, end in self.protect)


def request_settings(
    extra_args: Mapping[str, Any] | None, config: UncompConfig, prompt_tokens: int
) -> RequestSettings:
    """Merge a request's own settings with the server's.

    Raises:
        RequestError: unknown ``kv_`` name, bad value, or an override the operator does not allow.
    """
    given = {k: v for k, v in (extra_args or {}).items() if k.startswith("kv_")}
    unknown = sorted(set(given) - set(KEYS))
    if unknown:
        raise RequestError(f"unknown setting {unknown}; allowed: {list(KEYS)}")
    report = _switch("kv_report", given.pop("kv_report", False))
    if given and config.overrides == "forbid":
        raise RequestError(
            f"{sorted(given)}: this server does not allow per-request compression settings"
        )
    compress = _switch("kv_compress", given["kv_compress"]) if "kv_compress" in given else True
    own = _own(given, config, compress and given.get("kv_compact_at") is not None)
    keep, budget = config.keep, config.budget
    if "kv_keep" in given and "kv_budget" in given:
        raise RequestError("give kv_keep or kv_budget, not both")
    if "kv_keep" in given:
        keep, budget = _ratio(given["kv_keep"]), None
    elif "kv_budget" in given:
        keep, budget = None, _budget(given["kv_budget"], own or config)
    if "kv_keep" in given or "kv_budget" in given:
        _check_bounds(keep, budget, config, prompt_tokens)
    protect = _spans(given["kv_protect"], prompt_tokens) if "kv_protect" in given else ()
    compact_at = given.get("kv_compact_at")
    if compact_at is not None:
        compact_at = _place(compact_at, prompt_tokens)
    prefill_keep = _prefill_keep(given, config) if compress else 1.0
    if compact_at is not None and prefill_keep < 1:
        raise RequestError(
            "kv_compact_at reads a prompt in parts, and pruning needs the whole of it: add "
            "kv_prefill_keep=1"
        )
    compress = compress and keep != 1.0
    return RequestSettings(compress, keep, budget, protect, own, report, compact_at, prefill_keep)


def _prefill_keep(given: Mapping[str, Any], config: UncompConfig) -> float:
    if "kv_prefill_keep" not in given:
        return config.prefill_keep if config.prefill_keep is not None else 1.0
    asked = _ratio(given["kv_prefill_keep"], "kv_prefill_keep")
    if asked < 1 and config.prefill_keep is None:
        raise RequestError(
            f"kv_prefill_keep={asked}: this server prunes no prompts; start it with "
            f"--prefill-keep 1 to let requests ask for it"
        )
    if config.overrides == "tighten" and asked < (config.prefill_keep or 1.0):
        raise RequestError(
            f"kv_prefill_keep={asked}: on this server a request may only ask for more than the "
            f"default of {config.prefill_keep}"
        )
    return asked


def _own(given: Mapping[str, Any], config: UncompConfig, is_early: bool) -> UncompConfig | None:
    """Settings of the request's own policy; `is_early`: compressed in the middle of the prompt."""
    asked = [name for name in ("kv_policy", "kv_settings") if given.get(name) is not None]
    if asked and config.overrides == "tighten":
        raise RequestError(f"{asked}: on this server a request may only ask to keep more")
    policy = given.get("kv_policy")
    if policy is None and is_early:
        policy = config.policy_before_question
    elif not asked:
        return None
    try:
        own = own_config(policy, given.get("kv_settings"), config)
    except ValueError as error:
        raise RequestError(str(error)) from error
    return None if own == dataclasses.replace(config, prefill_keep=None) else own


def _check_bounds(
    keep: float | None, budget: int | None, config: UncompConfig, prompt_tokens: int
) -> None:
    share = keep if keep is not None else min(1.0, (budget or 0) / max(prompt_tokens, 1))
    if share < config.min_keep:
        raise RequestError(
            f"the request keeps {share:.3f} of its KV cache; this server allows {config.min_keep} "
            f"and more"
        )
    if config.overrides != "tighten":
        return
    own = (
        config.keep
        if config.keep is not None
        else min(1.0, (config.budget or 0) / max(prompt_tokens, 1))
    )
    if share < own:
        raise RequestError(
            f"the request keeps {share:.3f} of its KV cache; on this server a request may only ask "
            f"for more than the default of {own:.3f}"
        )


def _switch(name: str, value: Any) -> bool:
    choice = _SWITCH.get(str(value).strip().lower())
    if choice is None:
        raise RequestError(f"{name}={value!r}: must be true or false")
    return choice


def _ratio(value: Any, name: str = "kv_keep") -> float:
    try:
        ratio = float(value)
    except (TypeError, ValueError):
        ratio = float("nan")
    if isinstance(value, bool) or not 0 < ratio <= 1:
        raise RequestError(f"{name}={value!r}: must be a number in (0, 1], e.g. 0.25")
    return ratio


def _budget(value: Any, config: UncompConfig) -> int:
    least = config.recent_tokens + config.sinks
    try:
        number = float(value)
        tokens = int(number)
    except (TypeError, ValueError, OverflowError):
        number, tokens = float("nan"), -1
    if isinstance(value, bool) or tokens != number or tokens < least:
        raise RequestError(
            f"kv_budget={value!r}: must be a whole number of tokens, at least {least} "
            f"(the most recent and the first tokens always stay)"
        )
    return tokens


def _place(value: Any, prompt_tokens: int) -> int | None:
    """A number of leading prompt tokens; ``None`` for all of them."""
    try:
        number = float(value)
        place = int(number)
    except (TypeError, ValueError, OverflowError):
        number, place = float("nan"), 0
    at = place + prompt_tokens if place < 0 else place
    if isinstance(value, bool) or place != number or not 1 <= at <= prompt_tokens:
        raise RequestError(
            f"kv_compact_at={value!r}: must be a whole number of the prompt's {prompt_tokens} "
            f"tokens, at least 1, or negative to count from the end"
        )
    return at if at < prompt_tokens else None


def _spans(value: Any, prompt_tokens: int) -> tuple[tuple[int, int], ...]:
    parts = value if isinstance(value, list | tuple) else str(value).split(",")
    spans = []
    for part in parts:
        match = _SLICE.match(str(part))
        if match is None:
            raise RequestError(
                f"kv_protect={value!r}: must be slices of the prompt such as '0:200' or '-64:', "
                f"several as a list or separated by commas"
            )
        bounds = [None if text is None else int(text) for text in match.groups()]
        start, end, _ = slice(*bounds).indices(prompt_tokens)
        if start < end:
            spans.append((start, end))
    return _merge(sorted(spans))


def _merge(spans: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)
