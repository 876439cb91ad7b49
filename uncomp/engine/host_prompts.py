"""What a CPU worker knows of the prompts that are pruned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uncomp.engine.compactor import LayerCache
from uncomp.engine.cpu_layout import CacheLayout
from uncomp.engine.orders import Pruning
from uncomp.engine.seat import QueryRing
from uncomp.engine.state import CompressedRequests
from uncomp.pruning import Choice


class HostPrompts:
    """`pruner.PromptMemory` of a CPU worker.

    Args:
        caches: the attention layers, in order.
        layout: of a sub-block.
        requests: told what was kept.
        ring: the last queries of the prompts.
        build: makes attention metadata of a batch (vLLM's common metadata in).
    """

    def __init__(
        self,
        caches: list[LayerCache],
        layout: CacheLayout,
        requests: CompressedRequests,
        ring: QueryRing,
        build: Callable[[Any], Any],
    ) -> None:
        self._caches, self._layout, self._requests = caches, layout, requests
        self._ring, self._build = ring, build
        self.block_size, self.layers = requests.block_size, len(caches)

    def scores(
        self, choice: Choice, layer: int, order: Pruning, at: Tensor, blocks: Tensor
    ) -> Tensor:
        cache, total, kv_heads = self._caches[layer], order.num_tokens, self._requests.heads
        heads = torch.arange(kv_heads).unsqueeze(1)
        shape = (kv_heads, len(blocks), self.block_size, cache.cache.shape[3] // 2)
        keys = cache.cache.new_empty(shape)
        numbers = self._requests.bases[layer] + blocks.long() * kv_heads + heads
        self._layout.keys(cache.cache, numbers, keys)
        queries = self._ring.of_layer(layer, order.request_id, total, choice.queries)
        return choice.scores(
            queries.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3),
            keys.flatten(1, 2)[:, : len(at)],
            torch.arange(total - len(queries), total),
            at,
            cache.scale,
            cache.softcap,
        )

    def metadata(self, common: Any, before: Any) -> Any:
        return self._build(common)

    def place(self, order: Pruning, blocks: Tensor, kept: list[Tensor]) -> None:
        self._requests.place_pruned(order.request_id, order.num_tokens, blocks, kept)

    def forget_queries(self, request_id: str) -> None:
        self._ring.drop(request_id)

    def warm_up(self, blocks: int) -> None:
        """Nothing is compiled on a CPU."""
