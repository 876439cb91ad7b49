"""A request's own policy: ``kv_policy`` and ``kv_settings`` on top of the server's settings.

One server can thus answer the same prompt under any policy, which is how the evaluation compares
them: same engine, same batch, and the prefix cache computes the prompt once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from uncomp.config import PRESETS, UncompConfig

#: What a request may set. Not: files of the server, self-checks, and what bounds requests.
SETTABLE = (
    "window",
    "window_reduce",
    "recent",
    "sinks",
    "pooling",
    "pooling_kind",
    "reduce",
    "shares",
    "floor",
    "equal_from",
    "attention_share",
    "groups",
    "ratio",
    "reverse",
    "measure",
    "source",
    "truncation",
    "calibration",
    "online_tokens",
    "prefill_scores",
    "prefill_floor",
    "min_tokens",
    "recompact_every",
    "seed",
)


def own_config(policy: Any, settings: Any, server: UncompConfig) -> UncompConfig:
    """The server's settings with those of a request in their place.

    Args:
        policy: name of a policy or preset; ``None`` for the server's.
        settings: mapping, or the same as JSON text (``vllm_xargs`` holds no objects), of the names
            in :data:`SETTABLE`; ``None`` for no others. ``calibration`` can only be ``null``:
            entropies from the prompt, on a server that has a file. A preset's budget is left to
            ``kv_keep`` and ``kv_budget``.
        server: the server's settings; its ``prefill_keep`` is not taken over (see
            ``kv_prefill_keep``).

    Raises:
        ValueError: unknown name, bad value, or one that this server cannot serve: it remembers the
            last ``server.window`` queries, and none if its own policy needs none; and layers share
            one budget only where its own ``shares`` say so.
    """
    given = _mapping(settings)
    unknown = sorted(set(given) - set(SETTABLE))
    if unknown:
        raise ValueError(f"kv_settings: unknown setting {unknown}; allowed: {list(SETTABLE)}")
    if given.get("calibration") is not None:
        raise ValueError("kv_settings: calibration can only be null (entropies from the prompt)")
    if policy is not None and not isinstance(policy, str):
        raise ValueError(f"kv_policy={policy!r}: must be a name such as 'adakv'")
    preset = PRESETS.get(policy or "", {})
    filled = {name: value for name, value in preset.items() if name != "budget"}
    # The stages are the server's, whatever calibration the request's entropies come from.
    given = {**filled, **given, "prefill_keep": None}
    config = dataclasses.replace(server, policy=policy or server.policy, **given)
    if needs_queries(config):
        _check_queries(config, server)
    _check_shares(config, server)
    return config


def needs_queries(config: UncompConfig) -> bool:
    """Whether the policy scores with the last queries."""
    # Imported late: policies import torch.
    from uncomp import policies

    return policies.get(config.policy_name).needs_queries


def needs_words(config: UncompConfig) -> bool:
    """Whether it has to be known where the words and sentences of a request begin."""
    from uncomp import policies

    policy = policies.get(config.policy_name)
    by_words = policy.pool_scores and not all(part.like_everywhere for part in policy.parts())
    return config.pooling_kind == "word" and by_words


def _check_queries(config: UncompConfig, server: UncompConfig) -> None:
    if not needs_queries(server):
        raise ValueError(
            f"kv_policy={config.policy!r} scores with the last queries, but this server's policy "
            f"{server.policy!r} does not keep them; start it with one that does, e.g. entropy"
        )
    if config.window > server.window:
        raise ValueError(
            f"kv_settings: window={config.window}: this server remembers the last "
            f"{server.window} queries; start it with --kv-window {config.window}"
        )


def _check_shares(config: UncompConfig, server: UncompConfig) -> None:
    needs_file = config.shares == "calibrated" and server.shares != "calibrated"
    if needs_file or (config.shares != "policy" and server.shares == "policy"):
        raise ValueError(
            f"kv_settings: shares={config.shares!r}: this server was started with shares="
            f"{server.shares!r}; one started with --kv-shares calibrated and --kv-calibration FILE "
            f"serves all of them"
        )


def _mapping(settings: Any) -> Mapping[str, Any]:
    if isinstance(settings, str):
        try:
            settings = json.loads(settings)
        except json.JSONDecodeError as error:
            raise ValueError(f"kv_settings={settings!r} is not JSON: {error}") from error
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise ValueError(
            f'kv_settings={settings!r}: must be an object such as {{"pooling": 7}} or its JSON'
        )
    return settings
