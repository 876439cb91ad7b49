"""Where the settings live inside vLLM's configuration: ``additional_config["uncomp"]``."""

from __future__ import annotations

from typing import Any

from uncomp import envs, policies
from uncomp.config import UncompConfig

KEY = "uncomp"
#: name of the worker class of CPU engines
CPU_WORKER = "uncomp.engine.worker.CompactingCPUWorker"


def requested(vllm_config: Any) -> UncompConfig | None:
    """The settings asked for, or ``None``: not asked for, or switched off by the environment.

    Raises:
        ValueError: for settings that are not valid.
    """
    extra = vllm_config.additional_config
    if not isinstance(extra, dict) or KEY not in extra or envs.disabled():
        return None
    return UncompConfig.from_mapping(extra[KEY])


def engine_config(vllm_config: Any) -> UncompConfig:
    """The settings, inside an engine that was started with them.

    Raises:
        RuntimeError: the engine was started without.
    """
    config = requested(vllm_config)
    if config is None:
        raise RuntimeError(
            "uncomp's scheduler or worker class was set by hand, but additional_config has no "
            "'uncomp' entry; start with `uncomp serve` or --additional-config instead"
        )
    return config


def make_policy(config: UncompConfig) -> policies.Policy:
    """The policy that the settings describe."""
    name = config.policy_name
    scores = {"reduce": config.reduce, "over": config.window_reduce}
    own: dict[str, dict[str, Any]] = {
        "entropy": {
            "groups": config.groups,
            "ratio": config.ratio,
            "reverse": config.reverse,
            **scores,
        },
        "uniform": scores,
        "adakv": {"floor": config.least_share, "equal_from": config.equal_from, **scores},
        "hybrid": {"attention_share": config.attention_share, **scores},
        "random": {"seed": config.seed},
    }
    return policies.get(name, **own.get(name, {}))
