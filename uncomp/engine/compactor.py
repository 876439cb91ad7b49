"""Runs one order: choose the survivors of every layer and head, and move them.

Called between forward passes. The decisions are the policy's; this file only feeds it the cache.
Layers are worked off in groups: the small steps take a whole group at once, which costs little more
than a layer does; what needs keys or values takes one layer, so that few of them are in memory.

Where all layers share one budget, entries move to other layers' places, which may hold what has not
been read yet: then all survivors are read before the first is written.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from uncomp.config import UncompConfig
from uncomp.engine import moving
from uncomp.engine.cpu_layout import CacheLayout
from uncomp.engine.held import Bounds, Held, held_by, pad
from uncomp.engine.moving import Survivors
from uncomp.engine.orders import Order, Receipt
from uncomp.engine.state import CompressedRequests
from uncomp.importance import Needs, deal
from uncomp.kernels.entropy import Measure, spectrum, truncated_entropy
from uncomp.kernels.gram import gram
from uncomp.kernels.select import Pooling, pool_scores, top_entries
from uncomp.policies import LayerView, Policy
from uncomp.rotary import Rotary


@dataclass(frozen=True)
class LayerCache:
    """One attention layer of this rank.

    Attributes:
        index: layer number in the whole model (calibration files count all layers).
        cache: [num_blocks, num_kv_heads, block_size, 2 * head_size]; of all layers, one after the
            other, where they lie in one piece of memory.
        scale, softcap: of its attention logits.
        rotary: how its keys are rotated; None: they are not.
    """

    index: int
    cache: Tensor
    scale: float
    softcap: float
    rotary: Rotary | None = None


#: layers whose small steps are taken together; more would save little time and cost memory
_GROUP = 8


@dataclass(frozen=True)
class _Memory:
    """What keys are read into, layer after layer: fresh memory costs about as much as the reading.

    Attributes:
        keys: [heads, n, block_size, head_size], of one layer.
        sampled: [_GROUP, heads, m, head_size], every few tokens of the layers of a group; m is 0 if
            no entropy is measured.
    """

    keys: Tensor
    sampled: Tensor


@dataclass(frozen=True)
class _Kept:
    """What a compaction leaves in a group of layers.

    Attributes:
        counts: [layers, heads] int64, sub-blocks.
        dealt: a layer each, numbers of its sub-blocks in the order of its heads.
        positions: [layers, heads, K] int32 of the kept entries, valid up to the count.
        entropy: [layers, heads], or ``None``.
        score_seconds: what choosing took.
        unwritten: survivors that are still to be written.
    """

    counts: Tensor
    dealt: list[Tensor]
    positions: Tensor
    entropy: Tensor | None
    score_seconds: float
    unwritten: list[Survivors]


class Compactor:
    """Chooses and moves survivors.

    Args:
        config: the server's settings.
        policy: decides scores and shares.
        layers: this rank's attention layers.
        layout: of a sub-block.
        requests: table to read from and to record in.
        calibrated: [layers, heads] entropies of this rank from a calibration file, or ``None``.
        needs: of this rank's layers and heads, which share one budget; ``None``: the
            policy deals every layer's part.
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
        needs: Needs | None = None,
        rank: int = 0,
    ) -> None:
        self.config, self.policy, self.layers = config, policy, layers
        self.layout, self.requests, self.calibrated = layout, requests, calibrated
        self.needs = needs
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
        start = time.perf_counter()
        slot = self.requests.slots.get(order.request_id)
        if slot is not None:
            self.requests.extend(slot, row, math.ceil(order.num_tokens / self.block_size))
        own = self._sub_blocks(order)
        held = held_by(self.requests, order, row)
        bounds = Bounds.of(order, held, self.config, self.block_size)
        memory = self._memory(order, held)
        shared = self._shared(order, bounds, own)
        parts = []
        for first in range(0, len(self.layers), _GROUP):
            group = slice(first, first + _GROUP)
            given = (shared[0][group], shared[1][group]) if shared else None
            here = held.part(group), bounds.part(group)
            parts.append(self._compact(order, group, *here, queries, own, given, memory))
        for part in parts:
            for survivors in part.unwritten:
                survivors.write(self.layout)
        counts = torch.cat([part.counts for part in parts])
        width = int(counts.max())
        positions = torch.cat([pad(part.positions, width * self.block_size) for part in parts])
        entropies = [part.entropy for part in parts if part.entropy is not None]
        entropy = torch.cat(entropies) if entropies else None
        self.requests.place(
            order.request_id,
            order.generation,
            order.full_blocks,
            counts,
            moving.by_head([numbers for part in parts for numbers in part.dealt], counts),
            positions,
            entropy,
        )
        self._write_trace(order)
        tail = order.num_tokens - order.full_blocks * self.block_size
        tokens = int(counts.sum()) * self.block_size + tail * self.heads * len(self.layers)
        # What is not scoring is part of moving: bookkeeping before and after.
        score = sum(part.score_seconds for part in parts)
        return Receipt(
            order.request_id,
            order.generation,
            int(held.lengths.sum()),
            tokens,
            score,
            time.perf_counter() - start - score,
            self.heads * len(self.layers),
        )

    def _sub_blocks(self, order: Order) -> Tensor:
        """Numbers of the sub-blocks that each layer has to deal, [layers, blocks * heads]."""
        blocks = torch.tensor(order.kept_blocks)
        own = moving.own_sub_blocks(blocks, self.heads, self.requests.bases)
        if not self.config.relocate:
            return own
        # The self-check wants every token to end up elsewhere.
        return own.flip(0, 1) if self.needs is not None else own.flip(1)

    def _shared(
        self, order: Order, bounds: Bounds, own: Tensor
    ) -> tuple[Tensor, list[Tensor]] | None:
        """Where all layers share: counts [layers, heads], and the sub-blocks of every layer."""
        if self.needs is None:
            return None
        counts = bounds.maximum(self.block_size)
        if not self.config.relocate:
            total = len(order.kept_blocks) * self.heads * len(self.layers)
            minimum = bounds.minimum(self.block_size)
            counts = deal(self.needs, total, minimum, counts, self.config.least_share)
        return counts, moving.assign(own, counts)

    def _memory(self, order: Order, held: Held) -> _Memory:
        _, heads, count = held.sub_blocks.shape
        cache = self.layers[0].cache
        size = cache.shape[3] // 2
        is_measured = self.policy.needs_entropy and self._known_entropy(order, slice(0, 1)) is None
        sampled = -(-count * self.block_size // self._stride(held)) if is_measured else 0
        return _Memory(
            cache.new_empty(heads, count, self.block_size, size),
            cache.new_empty(_GROUP, heads, sampled, size),
        )

    def _stride(self, held: Held) -> int:
        """Of the tokens that the entropy is measured from."""
        return max(1, math.ceil(held.positions.shape[2] / self.config.online_tokens))

    def _compact(
        self,
        order: Order,
        group: slice,
        held: Held,
        bounds: Bounds,
        queries: Tensor | None,
        own: Tensor,
        given: tuple[Tensor, list[Tensor]] | None,
        memory: _Memory,
    ) -> _Kept:
        """One group of layers; `given`: counts and sub-blocks, where all layers share."""
        start = time.perf_counter()
        raw, entropy = self._measure(order, group, held, queries, memory)
        counts, chosen = self._choose(order, bounds, raw, entropy, given[0] if given else None)
        seconds = time.perf_counter() - start
        dealt = given[1] if given else moving.assign(own[group], counts)
        positions, unwritten = self._move(self.layers[group], held, chosen, dealt, bool(given))
        return _Kept(counts, dealt, positions, entropy, seconds, unwritten)

    def _measure(
        self, order: Order, group: slice, held: Held, queries: Tensor | None, memory: _Memory
    ) -> tuple[list[Tensor], Tensor | None]:
        """Scores [layers, heads, N] of the policy's parts and, if it needs them, entropies [layers,
        heads]."""
        stride = self._stride(held)
        keys = memory.keys.flatten(1, 2)
        sampled = memory.sampled[: len(held.lengths)]
        parts = self.policy.parts()
        raw: list[list[Tensor]] = [[] for _ in parts]
        for i, layer in enumerate(self.layers[group]):
            self.layout.keys(layer.cache, held.sub_blocks[i], memory.keys)
            if sampled.numel():
                sampled[i] = keys[:, ::stride]
            if self.config.relocate:
                raw[0].append(torch.zeros(held.positions[i].shape))
                continue
            own = queries[group][i] if queries is not None else None
            view = self._view(layer, order, held.lengths[i], held.positions[i], keys, own)
            for scores, part in zip(raw, parts, strict=True):
                scores.append(part.score(view))
        entropy = self._known_entropy(order, group)
        if sampled.numel():
            counts = (held.lengths.flatten() + stride - 1) // stride
            # Single precision moves an entropy by 1e-7; heads differ by 1e-2.
            covariance = gram(sampled.flatten(0, 1), counts).covariance()
            eigenvalues = spectrum(covariance, torch.float32)
            measure = cast(Measure, self.config.measure)
            values = truncated_entropy(eigenvalues, self.config.truncation, measure)
            entropy = values.view(held.lengths.shape)
        return [torch.stack(scores) for scores in raw if scores], entropy

    def _known_entropy(self, order: Order, group: slice) -> Tensor | None:
        """[layers, heads] from a calibration file or the first compaction, or ``None``."""
        if not self.policy.needs_entropy:
            return None
        if self.calibrated is not None:
            return self.calibrated[group]
        slot = self.requests.slots.get(order.request_id)
        # Survivors are a biased sample: the prompt's own entropy stays in force.
        return slot.entropy[group] if slot is not None and slot.entropy is not None else None

    def _view(
        self,
        layer: LayerCache,
        order: Order,
        lengths: Tensor,
        positions: Tensor,
        keys: Tensor,
        queries: Tensor | None,
    ) -> LayerView:
        if queries is None:
            grouped, at = None, torch.zeros(0, dtype=torch.int64)
        else:
            grouped = queries.unflatten(1, (self.heads, -1)).permute(1, 2, 0, 3)
            at = torch.arange(order.num_tokens - queries.shape[0], order.num_tokens)
        return LayerView(
            layer=layer.index,
            keys=keys,
            lengths=lengths,
            positions=positions,
            queries=grouped,
            query_positions=at,
            scale=layer.scale,
            softcap=layer.softcap,
            rotary=layer.rotary,
        )

    def _choose(
        self,
        order: Order,
        bounds: Bounds,
        parts: list[Tensor],
        entropy: Tensor | None,
        counts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Sub-blocks per head [layers, heads] (the given ones, if any) and chosen entries [layers,
        heads, K] (ascending, padded with -1)."""
        maximum = bounds.maximum(self.block_size)
        raw = pooled = parts[0]
        if not self.config.relocate:
            if self.policy.pool_scores:
                limits = (bounds.valid & ~bounds.recent).sum(2).flatten()
                kind = cast(Pooling, self.config.pooling_kind)
                given, at = (kind, self.config.pooling), bounds.places.flatten(0, 1)
                how = [part.pooling(*given) for part in self.policy.parts()]
                parts = [
                    pool_scores(one.flatten(0, 1), length, own, limits, at).view_as(one)
                    for one, (own, length) in zip(parts, how, strict=True)
                ]
            pooled = self.policy.combine(parts, bounds.eligible)
            if counts is None:
                minimum = bounds.minimum(self.block_size)
                total = torch.full(minimum.shape[:1], len(order.kept_blocks) * self.heads)
                counts = self.policy.share(
                    entropy, pooled, bounds.eligible, total, minimum, maximum, self.block_size
                )
        if counts is None:
            counts = maximum
        chosen = top_entries(
            pooled.flatten(0, 1),
            raw.flatten(0, 1),
            bounds.eligible.flatten(0, 1),
            bounds.forced.flatten(0, 1),
            (counts * self.block_size).flatten(),
        )
        return counts, chosen.unflatten(0, counts.shape)

    def _move(
        self,
        layers: list[LayerCache],
        held: Held,
        chosen: Tensor,
        dealt: list[Tensor],
        later: bool,
    ) -> tuple[Tensor, list[Survivors]]:
        """Copy the chosen entries into the dealt sub-blocks; sources may overlap them.

        Returns:
            [layers, heads, K] int32, positions of the chosen entries; and what is still to be
            written, if that is to be `later`.
        """
        index, used = chosen.clamp(min=0), chosen >= 0
        sources = held.sub_blocks.gather(2, index // self.block_size)
        slots = index % self.block_size
        blocks = (-1, self.block_size)
        unwritten = []
        for i, layer in enumerate(layers):
            # Head after head, as the sub-blocks are dealt; each head fills its own exactly.
            keys, values = self.layout.at(layer.cache, sources[i, used[i]], slots[i, used[i]])
            survivors = Survivors(
                layer.cache, dealt[i], keys.unflatten(0, blocks), values.unflatten(0, blocks)
            )
            if later:
                unwritten.append(survivors)
            else:
                survivors.write(self.layout)
        return held.positions.gather(2, index).to(torch.int32), unwritten

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
