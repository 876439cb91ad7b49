"""Turns settings into vLLM configuration: the one place where compression is switched on.

Runs in the process that builds the configuration (API server, ``LLM``), before the engine starts;
the classes named here are imported by name in the engine and worker processes.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import vllm
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from uncomp.config import UncompConfig
from uncomp.engine import admission, compat, conflicts, metrics
from uncomp.engine.calibrated import load_checked, schedule_of
from uncomp.engine.settings import CPU_WORKER, make_policy, requested
from uncomp.patches.apply import apply_all

logger = logging.getLogger("vllm.uncomp")

V2_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"

WORKERS = {
    "cpu": CPU_WORKER,
    "cuda": "uncomp.engine.cuda_worker.CompactingCUDAWorker",
}
SCHEDULER = "uncomp.engine.scheduler.CompactingScheduler"
ASYNC_SCHEDULER = "uncomp.engine.scheduler.CompactingAsyncScheduler"


def activate(vllm_config: VllmConfig) -> UncompConfig | None:
    """Install scheduler and worker into a finished configuration that asks for compression.

    Returns:
        The settings in force, or ``None``: not asked for, or switched off by ``UNCOMP_DISABLE``;
        the configuration is untouched then.

    Raises:
        ValueError: settings that are not valid, a calibration file that does not fit the model, or
            an engine feature that compression cannot work with.
    """
    config = requested(vllm_config)
    if config is None:
        return None
    if vllm_config.scheduler_config.scheduler_cls in (SCHEDULER, ASYNC_SCHEDULER):
        return config
    compat.check_version(vllm.__version__)
    apply_all()
    conflicts.check_config(vllm_config)
    make_policy(config)
    load_checked(config, vllm_config.model_config.hf_text_config)
    schedule_of(config, vllm_config.model_config.hf_text_config)
    asynchronous = vllm_config.scheduler_config.async_scheduling
    vllm_config.scheduler_config.scheduler_cls = ASYNC_SCHEDULER if asynchronous else SCHEDULER
    vllm_config.parallel_config.worker_cls = WORKERS[vllm_config.device_config.device_type]
    metrics.watch(vllm_config)
    admission.watch(config)
    logger.info("uncomp: compression is on: %s", config.to_dict())
    return config


def prepare_arguments(engine_args: Any) -> None:
    """Choose what the user left open, before the configuration is made of it.

    Blocks: a head's share is a whole number of them. vLLM's CPU default of 128 tokens would round
    the shares of short prompts away; 32 is the smallest block its CPU kernel is fast with.

    Model runner: on GPUs vLLM picks the V2 runner for many models; rows are matched to requests
    through the V1 runner.

    Chunked prefill: a prompt is pruned as a whole; without it, vLLM lets a step hold the longest
    prompt there can be.
    """
    config = requested(engine_args)
    if config is None:
        return
    is_open = engine_args.max_num_batched_tokens is engine_args.enable_chunked_prefill is None
    if config.prefill_keep is not None and is_open:
        engine_args.enable_chunked_prefill = False
    if current_platform.is_cpu():
        if engine_args.block_size is None:
            engine_args.block_size = 32
    elif V2_RUNNER not in os.environ:
        os.environ[V2_RUNNER] = "0"
        logger.info("uncomp: compression runs on vLLM's V1 model runner: %s=0 is set", V2_RUNNER)
