"""What a GPU worker knows of the prompts that are pruned. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uncomp.engine.arena import Arena
from uncomp.engine.device_state import DeviceRequests, QueryStore
from uncomp.engine.orders import Pruning
from uncomp.kernels.paged import Caches, Rows
from uncomp.kernels.window_scores.launch import window_scores_paged, workspace_size
from uncomp.pruning import CHOICES, Choice


class DevicePrompts:
    """`pruner.PromptMemory` of a worker with Triton.

    Args:
        caches: of the attention layers, in order.
        positions: [layers, num_blocks, heads, block_size] int32, see `DeviceCompactor`.
        scales, softcaps: [layers] float32 on the device, of the attention logits.
        requests: told what was kept.
        store: the last queries of the prompts.
        arena: working memory.
        build: makes attention metadata of a batch from vLLM's common metadata and the metadata of
            the layer before.
    """

    def __init__(
        self,
        caches: Caches,
        positions: Tensor,
        scales: Tensor,
        softcaps: Tensor,
        requests: DeviceRequests,
        store: QueryStore,
        arena: Arena,
        build: Callable[[Any, Any], Any],
    ) -> None:
        self._caches, self._positions = caches, positions
        self._scales, self._softcaps = scales, softcaps
        self._requests, self._store, self._arena = requests, store, arena
        self._build = build
        self.block_size, self.layers = caches.block_size, caches.layers

    def warm_up(self, blocks: int) -> None:
        """Compile what scores prompts; reads the first `blocks` blocks after the null block."""
        order = Pruning("uncomp-warm-up", blocks * self.block_size, ())
        at = torch.arange(order.num_tokens, device=self._caches.device)
        self._store.addresses(order.request_id, 0, min(order.num_tokens, self._store.window))
        for choice in CHOICES.values():
            numbers = torch.arange(1, blocks + 1, dtype=torch.int32, device=at.device)
            self.scores(choice, 0, order, at, numbers)
        self.forget_queries(order.request_id)

    def scores(
        self, choice: Choice, layer: int, order: Pruning, at: Tensor, blocks: Tensor
    ) -> Tensor:
        device, tokens = self._caches.device, at.shape[0]
        # To this layer the prompt is a sequence of its own, never compacted.
        rows = Rows(
            blocks.unsqueeze(0),
            torch.full((1,), tokens, dtype=torch.int32, device=device),
            torch.full((1,), -1, dtype=torch.int32, device=device),
        )
        part = slice(layer, layer + 1)
        queries = self._store.of_layer(layer, order.request_id, order.num_tokens, choice.queries)
        window, query_heads, _ = queries.shape
        entries = -(-tokens // 64) * 64  # kernels are specialised on multiples of 16
        self._arena.clear()
        out = self._arena.take((1, 1, self._caches.heads, entries))
        size = workspace_size(1, 1, query_heads, window, entries)
        window_scores_paged(
            self._caches.part(layer, layer + 1),
            rows,
            self._requests.holdings.part(layer, layer + 1),
            queries[None, None],
            self._scales[part],
            self._softcaps[part],
            "sum",
            out,
            self._arena.take((size,)),
            over=choice.over,
        )
        return out[0, 0, :, :tokens].sum(0)

    def metadata(self, common: Any, before: Any) -> Any:
        return self._build(common, before)

    def place(self, order: Pruning, blocks: Tensor, kept: list[Tensor]) -> None:
        self._requests.place_pruned(
            order.request_id, order.num_tokens, blocks, kept, self._positions
        )

    def forget_queries(self, request_id: str) -> None:
        self._store.drop(request_id)
