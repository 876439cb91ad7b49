"""Every refused combination is found, alone, in an otherwise good configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from uncomp.engine import activate
from uncomp.engine.conflicts import (
    CONFLICTS,
    PRUNING_CONFLICTS,
    STOCK_WORKERS,
    ConflictError,
    check_config,
)


def configuration(device: str = "cpu") -> Any:
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type=device),
        parallel_config=SimpleNamespace(
            worker_cls=STOCK_WORKERS[device],
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_dbo=False,
            pipeline_parallel_size=1,
        ),
        scheduler_config=SimpleNamespace(
            scheduler_cls=None, max_num_batched_tokens=4096, long_prefill_token_threshold=0
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", kv_sharing_fast_prefill=False),
        model_config=SimpleNamespace(
            is_encoder_decoder=False,
            runner_type="generate",
            use_mla=False,
            uses_mrope=False,
            max_model_len=4096,
            skip_tokenizer_init=False,
        ),
        lora_config=None,
        additional_config={},
        use_v2_model_runner=False,
        speculative_config=None,
        kv_transfer_config=None,
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plain_configuration_is_accepted(device: str) -> None:
    check_config(configuration(device))
    assert device in activate.WORKERS


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("parallel_config.worker_cls", "my.Worker", "drop --worker-cls"),
        ("scheduler_config.scheduler_cls", "my.Scheduler", "drop --scheduler-cls"),
        ("use_v2_model_runner", True, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ("speculative_config", object(), "drop --speculative-config"),
        ("kv_transfer_config", object(), "drop --kv-transfer-config"),
        ("parallel_config.decode_context_parallel_size", 2, "context-parallel-size 1"),
        ("parallel_config.prefill_context_parallel_size", 2, "context-parallel-size 1"),
        ("parallel_config.enable_dbo", True, "drop --enable-dbo"),
        ("cache_config.cache_dtype", "fp8", "--kv-cache-dtype auto"),
        ("cache_config.calculate_kv_scales", True, "drop --calculate-kv-scales"),
        ("cache_config.kv_sharing_fast_prefill", True, "drop --kv-sharing-fast-prefill"),
        ("model_config.is_encoder_decoder", True, "encoder-decoder"),
        ("model_config.runner_type", "pooling", "pooling"),
        ("model_config.use_mla", True, "MLA"),
    ],
)
def test_conflict_is_named(where: str, value: object, message: str) -> None:
    config = configuration()
    _set(config, where, value)
    assert sum(conflict.found(config) for conflict in CONFLICTS) == 1
    with pytest.raises(ConflictError, match=message):
        check_config(config)


def test_other_devices_are_refused() -> None:
    config = configuration()
    config.device_config.device_type = "xpu"
    with pytest.raises(ConflictError, match="a device other than a CPU or an NVIDIA GPU"):
        check_config(config)


def test_gpu_takes_fp8_but_not_batch_invariance(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration("cuda")
    config.cache_config.cache_dtype = "fp8_e4m3"
    check_config(config)
    config.cache_config.cache_dtype = "fp8_e5m2"
    with pytest.raises(ConflictError, match="FP8 \\(e4m3\\)"):
        check_config(config)
    config.cache_config.cache_dtype = "auto"
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ConflictError, match="unset VLLM_BATCH_INVARIANT"):
        check_config(config)


def test_words_need_a_tokenizer() -> None:
    config = configuration()
    config.model_config.skip_tokenizer_init = True
    for kind in ("ema", "word"):
        config.additional_config = {"uncomp": {"keep": 0.5, "pooling_kind": kind}}
        if kind == "ema":
            check_config(config)
    with pytest.raises(ConflictError, match="set --kv-pooling-kind ema --kv-pooling 16"):
        check_config(config)


def test_layers_that_share_are_pruned_on_cpus_only() -> None:
    sharing = {"keep": 0.5, "shares": "pyramid"}
    pruning = {"prefill_keep": 0.5, "prefill_stages": "2,5"}
    for device in ("cpu", "cuda"):
        config = configuration(device)
        config.additional_config = {"uncomp": sharing}
        check_config(config)
        config.additional_config = {"uncomp": sharing | pruning}
        if device == "cpu":
            check_config(config)
        else:
            with pytest.raises(ConflictError, match=r"all layers share.*set shares to 'policy'"):
                check_config(config)


def _set(config: Any, where: str, value: object) -> None:
    *path, name = where.split(".")
    setattr(getattr(config, path[0]) if path else config, name, value)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("parallel_config.pipeline_parallel_size", 2, "pipeline-parallel-size 1"),
        ("scheduler_config.max_num_batched_tokens", 2048, "--max-num-batched-tokens"),
        ("scheduler_config.long_prefill_token_threshold", 512, "--long-prefill-token-threshold"),
        ("lora_config", object(), "drop --enable-lora"),
        ("model_config.uses_mrope", True, "M-RoPE"),
    ],
)
def test_conflict_with_pruning_is_named(where: str, value: object, message: str) -> None:
    config = configuration()
    _set(config, where, value)
    check_config(config)  # only compressed: fine
    config.additional_config = {
        "uncomp": {"keep": 0.5, "prefill_keep": 0.5, "prefill_stages": "2,5"}
    }
    assert sum(conflict.found(config) for conflict in PRUNING_CONFLICTS) == 1
    with pytest.raises(ConflictError, match=message):
        check_config(config)
