"""What workers with Triton have in common: the seat over device memory."""

from __future__ import annotations

import logging
import os
from typing import Any, cast

import torch
from torch import Tensor
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import KVCacheConfig

from uncomp.config import UncompConfig
from uncomp.engine.arena import LEAST_BYTES, Arena
from uncomp.engine.by_config import ByConfig
from uncomp.engine.calibrated import rank_entropies, rank_needs, schedule_of, shares_layers
from uncomp.engine.device_compactor import DeviceCompactor
from uncomp.engine.device_prompts import DevicePrompts
from uncomp.engine.device_seat import DeviceSeat
from uncomp.engine.device_state import DeviceRequests, QueryStore
from uncomp.engine.pruned_model import PrunedModel
from uncomp.engine.pruner import Pruner
from uncomp.engine.settings import make_policy
from uncomp.engine.worker_base import CompactingWorker
from uncomp.kernels.decode import DecodeWorkspace, programs
from uncomp.kernels.paged import Caches
from uncomp.pruning import WIDEST

logger = logging.getLogger("vllm.uncomp")

#: keep ratio that the order of layers is taken from where a budget in tokens is set
_TYPICAL_KEEP = 0.125


class DeviceWorker(CompactingWorker):
    """Decode rows run on our kernel, compactions on the device between forward passes."""

    _seat: DeviceSeat | None
    _arena: Arena | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        # Before vLLM measures what is left for the KV cache.
        self._arena = Arena(self._arena_bytes(), self.device)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig, *args: Any) -> None:
        super().initialize_from_config(kv_cache_config, *args)  # type: ignore[misc]
        builder = self._only_builder()
        self._seat = builder.seat = self._make_seat()
        if self.device.type == "cuda":
            self.warm_up_compression()

    def warm_up_compression(self) -> None:
        """Compile the kernels before graphs are captured and requests come."""
        assert self._seat is not None
        impl: Any = next(iter(self._attention_layers().values())).impl
        self._seat.warm_up(float(impl.logits_soft_cap or 0.0))

    def row_ids(self) -> list[str]:
        return self._row_ids()

    def block_table(self) -> Tensor:
        table = self.model_runner.input_batch.block_table[0]
        return table.block_table.gpu

    def replace_blocks(self, request_id: str, first: int, blocks: tuple[int, ...]) -> None:
        state = self.model_runner.requests[request_id].block_ids[0]
        last = first + len(blocks)
        if tuple(state[first:last]) == blocks:
            return
        # The copy of this step's table to the device may still be on its way: wait for that.
        event = getattr(self.model_runner, "prepare_inputs_event", None)
        if event is not None:
            event.synchronize()
        state[first:last] = blocks
        self._host_row(request_id)[first:last] = torch.tensor(blocks, dtype=torch.int32)

    def uncomp_report(self) -> dict[str, Any]:
        """Facts about this process for `uncomp doctor` (called through ``collective_rpc``)."""
        seat = self._seat
        return {
            **self._report(),
            "compressed_requests": len(seat.requests) if seat else 0,
            "recorded_requests": len(seat.store) if seat and seat.store else 0,
            "key_layout": "plain",
            "decode_steps": seat.decode_steps if seat else 0,
            "decode_executions": seat.executions.tolist() if seat else [],
        }

    def _arena_bytes(self) -> int:
        """Enough for one layer of the longest request, whatever is kept of it."""
        heads = self.model_config.get_num_kv_heads(self.parallel_config)
        size = self.model_config.get_head_size()
        # K, V and a position of every entry; two scores, the place and the choice; alignment.
        entry = 2 * size * 2 + 4 + 4 * 4
        longest = heads * self.model_config.max_model_len * entry
        statistics = heads * (16 * size * size + 64 * size)
        return max(LEAST_BYTES, 2 * (longest + statistics))

    def _layers_in_order(self) -> dict[str, Any]:
        """The attention layers; where they share one budget, those that need least come first.

        A compaction works them off in this order, and then finds room in what it has read; see
        `uncomp.importance.in_order`.
        """
        layers: dict[str, Any] = dict(self._attention_layers())
        if not shares_layers(self._uncomp):
            return layers
        numbers = [extract_layer_index(name) for name in layers]
        heads = self.model_config.get_num_kv_heads(self.parallel_config)
        needs = rank_needs(self._uncomp, self.vllm_config, numbers, heads)
        assert needs is not None
        least = needs.at(self._uncomp.keep or _TYPICAL_KEEP).sum(1).tolist()
        ranked = sorted(zip(least, range(len(least)), layers, strict=True))
        return {name: layers[name] for _, _, name in ranked}

    def _make_seat(self) -> DeviceSeat:
        layers = self._layers_in_order()
        impls = [layer.impl for layer in layers.values()]
        for i, impl in enumerate(impls):
            impl.layer_index = i
        first = next(iter(layers.values()))
        tensors = [layer.kv_cache for layer in layers.values()]
        scales = None
        if tensors[0].dtype.itemsize == 1:
            # vLLM keeps FP8 caches as bytes; these are the values, not copies.
            tensors = [tensor.view(torch.float8_e4m3fn) for tensor in tensors]
            pairs = [torch.stack([la._k_scale, la._v_scale]).flatten() for la in layers.values()]
            scales = torch.stack(pairs)
        caches = Caches.of(tensors, scales)
        most = self.vllm_config.scheduler_config.max_num_seqs
        shared = shares_layers(self._uncomp)
        requests = DeviceRequests(caches.layers, caches.heads, most, caches.device, shared)
        store = None
        dtype = cast(torch.dtype, self.model_config.dtype)
        schedule = schedule_of(self._uncomp, self.model_config.hf_text_config)
        if self._policy.needs_queries or schedule is not None:
            shape = (first.num_heads, first.head_size)
            window = max(self._uncomp.window, WIDEST if schedule is not None else 0)
            store = QueryStore(caches.layers, window, shape, dtype, caches.device)
        numbers = [extract_layer_index(name) for name in layers]
        shape4 = (caches.layers, *tensors[0].shape[:3])
        positions = torch.zeros(shape4, dtype=torch.int32, device=caches.device)
        arena = self._arena
        assert arena is not None
        scaling = torch.tensor([impl.scale for impl in impls], device=caches.device)
        softcaps = [float(impl.logits_soft_cap or 0) for impl in impls]
        capping = torch.tensor(softcaps, device=caches.device)

        turned = dict(zip(self._attention_layers(), self._rotaries(), strict=True))

        def compactor(config: UncompConfig) -> DeviceCompactor:
            entropies = rank_entropies(config, self.vllm_config, numbers, caches.heads)
            return DeviceCompactor(
                config,
                make_policy(config),
                caches,
                positions,
                numbers,
                scaling,
                capping,
                requests,
                arena,
                entropies,
                self.rank,
                [turned[name] for name in layers],
                rank_needs(config, self.vllm_config, numbers, caches.heads),
            )

        default = compactor(self._uncomp)
        # Batches are padded to the size of a captured graph.
        graphs = self.vllm_config.compilation_config.max_cudagraph_capture_size or 0
        rows = max(most, graphs)
        workspace = DecodeWorkspace.empty(
            layers=caches.layers,
            rows=rows,
            heads=caches.heads,
            group=first.num_heads // caches.heads,
            head_size=caches.head_size,
            programs=programs(caches.device),
            device=caches.device,
        )
        logger.info(
            "uncomp is active in worker %d (pid %d): %s, %d layers, %d KV heads, block size %d, "
            "entropies %s",
            self.rank,
            os.getpid(),
            self._backend_path(),
            caches.layers,
            caches.heads,
            caches.block_size,
            "calibrated" if default.calibrated is not None else "from the prompt",
        )
        compactors = ByConfig(default, compactor)
        seat = DeviceSeat(requests, store, compactors, caches, workspace, rows, dtype, self)
        if schedule is not None:
            assert store is not None
            build = self._only_builder().build_shorter
            seat.pruner = Pruner(
                self._uncomp,
                schedule,
                PrunedModel.of(self.model_runner.get_model(), list(layers)),
                list(layers),
                DevicePrompts(caches, positions, scaling, capping, requests, store, arena, build),
                caches.device,
                self.rank,
            )
        return seat
