"""vLLM's GPU worker with a seat for compression; installed through ``worker_cls``."""

from __future__ import annotations

from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu_worker import Worker

from uncomp.engine.cuda_backend import SubBlockFlashBackend
from uncomp.engine.device_worker import DeviceWorker


class CompactingCUDAWorker(DeviceWorker, Worker):
    """Prefill by FlashAttention, decoding over sub-blocks."""

    stock_backend = AttentionBackendEnum.FLASH_ATTN
    backend = SubBlockFlashBackend
