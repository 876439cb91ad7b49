"""vLLM's CPU worker with a seat for compression; installed through ``worker_cls``."""

from __future__ import annotations

import logging
import os
from typing import Any, cast

import torch
import vllm
from torch import Tensor
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from uncomp.config import UncompConfig
from uncomp.engine.by_config import ByConfig
from uncomp.engine.calibrated import (
    rank_entropies,
    rank_needs,
    schedule_of,
    shares_layers,
)
from uncomp.engine.compactor import Compactor, LayerCache
from uncomp.engine.cpu_backend import SeatedBackend, SeatedImpl
from uncomp.engine.cpu_layout import probe_layout
from uncomp.engine.host_prompts import HostPrompts
from uncomp.engine.one_piece import in_one_piece
from uncomp.engine.pruned_model import PrunedModel
from uncomp.engine.pruner import Pruner
from uncomp.engine.seat import QueryRing, Seat
from uncomp.engine.settings import make_policy
from uncomp.engine.state import CompressedRequests
from uncomp.engine.worker_base import CompactingWorker
from uncomp.pruning import WIDEST

logger = logging.getLogger("vllm.uncomp")


class CompactingCPUWorker(CompactingWorker, CPUWorker):
    """Compressed rows are attended to by vLLM's own CPU kernel."""

    stock_backend = AttentionBackendEnum.CPU_ATTN
    backend = SeatedBackend
    _seat: Seat | None

    def initialize_from_config(self, kv_cache_config: KVCacheConfig, *args: Any) -> None:
        super().initialize_from_config(kv_cache_config, *args)
        builder = self._only_builder()
        self._seat = builder.seat = self._make_seat(builder.isa)

    def uncomp_report(self) -> dict[str, Any]:
        """Facts about this process for `uncomp doctor` (called through ``collective_rpc``)."""
        seat = self._seat
        return {
            **self._report(),
            "compressed_requests": len(seat.requests) if seat else 0,
            "recorded_requests": len(seat.ring) if seat and seat.ring else 0,
            "key_layout": seat.compactors.default.layout.key.kind if seat else "",
        }

    def _make_seat(self, isa: str) -> Seat:
        layers = self._attention_layers()
        caches = []
        rotaries = self._rotaries()
        joined, bases = self._joined([layer.kv_cache for layer in layers.values()])
        for i, (name, layer) in enumerate(layers.items()):
            assert isinstance(layer.impl, SeatedImpl)
            layer.impl.layer_index = i
            cache = layer.kv_cache if joined is None else joined
            layer.impl.hold(cache)
            caches.append(
                LayerCache(
                    extract_layer_index(name),
                    cache,
                    layer.impl.scale,
                    float(layer.impl.logits_soft_cap),
                    rotaries[i],
                )
            )
        first = next(iter(layers.values()))
        _, heads, block_size, _ = caches[0].cache.shape
        layout = probe_layout(block_size, first.head_size, caches[0].cache.dtype, isa)
        requests = CompressedRequests(len(caches), heads, block_size, bases * heads)
        ring = None
        schedule = schedule_of(self._uncomp, self.model_config.hf_text_config)
        if self._policy.needs_queries or schedule is not None:
            shape = (first.num_heads, first.head_size)
            dtype = cast(torch.dtype, self.model_config.dtype)
            window = max(self._uncomp.window, WIDEST if schedule is not None else 0)
            ring = QueryRing(len(caches), window, shape, dtype)
        indices = [cache.index for cache in caches]

        def compactor(config: UncompConfig) -> Compactor:
            entropies = rank_entropies(config, self.vllm_config, indices, heads)
            needs = rank_needs(config, self.vllm_config, indices, heads)
            policy = make_policy(config)
            return Compactor(config, policy, caches, layout, requests, entropies, needs, self.rank)

        default = compactor(self._uncomp)
        logger.info(
            "uncomp is active in worker %d (pid %d): %s, %d layers, %d KV heads, block size %d, "
            "keys stored %s, entropies %s, shares by %s",
            self.rank,
            os.getpid(),
            self._backend_path(),
            len(caches),
            heads,
            block_size,
            layout.key.kind,
            "calibrated" if default.calibrated is not None else "from the prompt",
            "policy, layer by layer"
            if default.needs is None
            else f"{self._uncomp.shares}, over all",
        )
        compactors = ByConfig(default, compactor)
        seat = Seat(requests, ring, compactors, self._row_ids, self._host_row)
        if schedule is not None:
            assert ring is not None
            seat.pruner = Pruner(
                self._uncomp,
                schedule,
                PrunedModel.of(self.model_runner.get_model(), list(layers)),
                list(layers),
                HostPrompts(caches, layout, requests, ring, self._only_builder().metadata),
                torch.device("cpu"),
                self.rank,
            )
        return seat

    def _joined(self, caches: list[Tensor]) -> tuple[Tensor | None, Tensor]:
        """The caches of all layers as one (``None``: they are not), and every layer's first block.

        Raises:
            RuntimeError: layers are to share a budget and their caches lie apart.
        """
        found = in_one_piece(caches)
        if found is not None:
            return found
        if shares_layers(self._uncomp):
            raise RuntimeError(
                f"uncomp: shares={self._uncomp.shares!r} needs the caches of all layers in one "
                f"piece of memory; this vLLM ({vllm.__version__}) has them apart (0.32 has not). "
                f"Use another vLLM or shares='policy'"
            )
        return None, torch.zeros(len(caches), dtype=torch.int64)
