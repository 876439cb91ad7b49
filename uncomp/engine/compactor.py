"""Runs one order: choose the survivors of every layer and head, and move them.

Called between forward passes. The decisions are the policy's; this file only feeds it the cache.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from uncomp.config import UncompConfig
from uncomp.engine.cpu_layout import CacheLayout
from uncomp.engine.orders import Order, Receipt
from uncomp.engine.state import CompressedRequests
from uncomp.kernels.entropy import Measure, spectrum, truncated_entropy
from uncomp.kernels.gram import gram
from uncomp.kernels.select import max_pool, top_entries
from uncomp.policies import LayerView, Policy


@dataclass(frozen=True)
class LayerCache:
    """One attention layer of this rank.

    Attributes:
        index: layer number in the whole model (calibration files count all layers).
        cache: [num_blocks, num_kv_heads, block_size, 2 * head_size].
        scale, softcap: of its attention logits.
    """

    index: int
    cache: Tensor
    scale: float
    softcap: float


@dataclass
class _Held:
    """What a request holds in one layer before compaction; see CompressedRequests.entries."""

    sub_blocks: Tensor
    lengths: Tensor
    positions: Tensor


@dataclass
class _Clock:
    score: float = 0.0
    move: float = 0.0
    _since: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        setattr(self, name, getattr(self, name) + now - self._since)
        self._since = now


class Compactor:
    """Chooses and moves survivors.

    Args:
        config: the server's settings.
        policy: decides scores and shares.
        layers: this rank's attention layers.
        layout: of a sub-block.
        requests: table to read from and to record in.
        calibrated: [layers, heads] entropies of this rank from a calibration file, or ``None``.
        rank: names the trace file.
    """

    def __init__(
        self,
        config: UncompConfig,
        policy: Policy,
        layers: list[LayerCache],
        layout: CacheLayout,
        requests: CompressedRequests,
        calibrated: Tensor | None = None,
        rank: int = 0,
    ) -> None:
        self.config, self.policy, self.layers = config, policy, layers
        self.layout, self.requests, self.calibrated = layout, requests, calibrated
        self.heads, self.block_size = requests.heads, requests.block_size
        self._trace = Path(config.trace, f"kept-{rank}.jsonl") if config.trace else None
        if self._trace is not None:
            self._trace.parent.mkdir(parents=True, exist_ok=True)

    def run(self, order: Order, row: Tensor, queries: Tensor | None) -> Receipt:
        """Carry out an order.

        Args:
            row: [>= blocks] int, the request's block ids; only read for a first compaction and for
                blocks after the last one (older entries are stale).
            queries: [layers, w, num_query_heads, head_size], the last queries, oldest first; may be
                fewer than the window; ``None`` if the policy needs none.
        """
        clock = _Clock()
        slot = self.requests.slots.get(order.request_id)
        if slot is not None:
            self.requests.extend(slot, row, math.ceil(order.num_tokens / self.block_size))
        dealt = self._sub_blocks(order)
        kept, numbers, positions, entropies = [], [], [], []
        seen = 0
        for i, layer in enumerate(self.layers):
            held = self._held(order, row, i)
            keys = self.layout.keys(layer.cache, held.sub_blocks).flatten(1, 2)
            entropy = self._entropy(order, i, keys, held.lengths)
            view = self._view(i, order, held, keys, queries, entropy)
            counts, chosen = self._choose(order, view)
            clock.lap("score")
            kept_positions = self._move(layer, held, keys, counts, chosen, dealt)
            clock.lap("move")
            seen += int(held.lengths.sum())
            kept.append(counts)
            numbers.append(_per_head(dealt, counts))
            positions.append(kept_positions)
            entropies.append(entropy)
        all_kept = torch.stack(kept)
        width = int(all_kept.max())
        self.requests.place(
            order,
            all_kept,
            torch.stack([_pad(n, width) for n in numbers]),
            torch.stack([_pad(p, width * self.block_size) for p in positions]),
            None if entropies[0] is None else torch.stack(entropies),  # type: ignore[arg-type]
        )
        self._write_trace(order)
        tail = order.num_tokens - order.full_blocks * self.block_size
        tokens = int(all_kept.sum()) * self.block_size + tail * self.heads * len(self.layers)
        clock.lap("move")
        return Receipt(order.request_id, order.generation, seen, tokens, clock.score, clock.move)

    def _sub_blocks(self, order: Order) -> Tensor:
        """Numbers of the sub-blocks that are dealt to the heads, [blocks * heads]."""
        blocks = torch.tensor(order.kept_blocks)
        numbers = (blocks.unsqueeze(1) * self.heads + torch.arange(self.heads)).flatten()
        # The self-check wants every token to end up elsewhere.
        return numbers.flip(0) if self.config.relocate else numbers

    def _held(self, order: Order, row: Tensor, layer: int) -> _Held:
        slot = self.requests.slots.get(order.request_id)
        if slot is not None:
            return _Held(*self.requests.entries(slot, layer, order.num_tokens))
        blocks = row[: math.ceil(order.num_tokens / self.block_size)].long()
        heads = torch.arange(self.heads).unsqueeze(1)
        return _Held(
            blocks * self.heads + heads,
            torch.full((self.heads,), order.num_tokens),
            torch.arange(blocks.numel() * self.block_size).expand(self.heads, -1),
        )

    def _entropy(self, order: Order, layer: int, keys: Tensor, lengths: Tensor) -> Tensor | None:
        if not self.policy.needs_entropy:
            return None
        if self.calibrated is not None:
            return self.calibrated[layer]
        slot = self.requests.slots.get(order.request_id)
        if slot is not None and slot.entropy is not None:
            # Survivors are a biased sample: the prompt's own entropy stays in force.
            return slot.entropy[layer]
        stride = max(1, math.ceil(keys.shape[1] / self.config.online_tokens))
        eigenvalues = spectrum(gram(keys, lengths, stride).covariance())
        measure = cast(Measure, self.config.measure)
        return truncated_entropy(eigenvalues, self.config.truncation, measure)

    def _view(
        self,
        index: int,
        order: Order,
        held: _Held,
        keys: Tensor,
        queries: Tensor | None,
        entropy: Tensor | None,
    ) -> LayerView:
        layer = self.layers[index]
        if queries is None:
            grouped, at = None, torch.zeros(0, dtype=torch.int64)
        else:
            window = queries[index]
            grouped = window.unflatten(1, (self.heads, -1)).permute(1, 2, 0, 3)
            at = torch.arange(order.num_tokens - window.shape[0], order.num_tokens)
        return LayerView(
            layer=layer.index,
            keys=keys,
            lengths=held.lengths,
            positions=held.positions,
            queries=grouped,
            query_positions=at,
            scale=layer.scale,
            softcap=layer.softcap,
            entropy=entropy,
        )

    def _choose(self, order: Order, view: LayerView) -> tuple[Tensor, Tensor]:
        """Sub-blocks per head [H] and chosen entries [H, K] (ascending, padded with -1)."""
        positions, limit = view.positions, order.full_blocks * self.block_size
        valid = torch.arange(positions.shape[1]) < view.lengths.unsqueeze(1)
        eligible = valid & (positions < limit)
        recent = positions >= order.num_tokens - self.config.window
        forced = eligible & ((positions < self.config.sinks) | recent)
        for start, end in order.protect:
            forced |= eligible & (positions >= start) & (positions < end)
        maximum = eligible.sum(1) // self.block_size
        if self.config.relocate:
            raw = torch.zeros(positions.shape)
            return maximum, top_entries(raw, raw, eligible, forced, maximum * self.block_size)
        raw = self.policy.score(view)
        pooled = raw
        if self.policy.pool_scores and self.config.pooling > 1:
            pooled = max_pool(raw, self.config.pooling, (valid & ~recent).sum(1))
        minimum = -(-forced.sum(1) // self.block_size)
        total = len(order.kept_blocks) * self.heads
        counts = self.policy.deal(view, pooled, eligible, total, minimum, maximum, self.block_size)
        return counts, top_entries(pooled, raw, eligible, forced, counts * self.block_size)

    def _move(
        self,
        layer: LayerCache,
        held: _Held,
        keys: Tensor,
        counts: Tensor,
        chosen: Tensor,
        dealt: Tensor,
    ) -> Tensor:
        """Copy the chosen entries into the dealt sub-blocks; sources may overlap them.

        Returns:
            [H, K] int32, positions of the chosen entries.
        """
        index = chosen.clamp(min=0)
        new_keys = keys.gather(1, index.unsqueeze(-1).expand(-1, -1, keys.shape[2]))
        source = held.sub_blocks.gather(1, index // self.block_size)
        new_values = self.layout.values_at(layer.cache, source, index % self.block_size)
        blocks = (-1, self.block_size)
        used = torch.arange(chosen.shape[1] // self.block_size) < counts.unsqueeze(1)
        self.layout.write(
            layer.cache,
            dealt[: int(counts.sum())],
            new_keys.unflatten(1, blocks)[used],
            new_values.unflatten(1, blocks)[used],
        )
        return held.positions.gather(1, index).to(torch.int32)

    def _write_trace(self, order: Order) -> None:
        if self._trace is None:
            return
        slot = self.requests.slots[order.request_id]
        kept = self.requests.kept_positions(slot)
        record = {
            "request_id": order.request_id,
            "generation": order.generation,
            "num_tokens": order.num_tokens,
            "full_blocks": order.full_blocks,
            "block_size": self.block_size,
            "kept": kept,
        }
        with open(self._trace, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _per_head(dealt: Tensor, counts: Tensor) -> Tensor:
    """[sub-blocks] dealt head after head -> [heads, max count], padded with 0."""
    width = int(counts.max())
    used = torch.arange(width) < counts.unsqueeze(1)
    numbers = torch.zeros(counts.shape[0], width, dtype=dealt.dtype)
    numbers[used] = dealt[: int(counts.sum())]
    return numbers


def _pad(tensor: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))
