"""Runs the orders of a step on a GPU: all layers and heads of several requests in few launches.

The same decisions as `compactor.py`, taken on the device: nothing here waits for it, and working
memory comes from an arena. Policies that score with the window's attention use the kernels; others
see dense copies of one layer at a time and may be slow, they are there to be compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from uncomp.config import UncompConfig
from uncomp.engine.arena import Arena, aligned
from uncomp.engine.device_clock import DeviceClock
from uncomp.engine.device_orders import Facts, Job, facts_of, widest
from uncomp.engine.device_shares import Dealt, deal_order, dealt
from uncomp.engine.device_state import DeviceRequests, DeviceSlot, to_device
from uncomp.engine.device_trace import write_trace
from uncomp.engine.orders import Receipt
from uncomp.importance import Needs
from uncomp.kernels.compact.launch import compact, scratch_bytes
from uncomp.kernels.entropy import Measure
from uncomp.kernels.entropy.launch import Scratch, spectral_entropy
from uncomp.kernels.gram.launch import GramBuffers, covariance, gram_paged
from uncomp.kernels.paged import Caches, Holdings, gather, stored_sub_blocks, sub_blocks
from uncomp.kernels.select import Pooling
from uncomp.kernels.select.launch import Terms, choose, entry_places, limits, pool
from uncomp.kernels.window_scores.launch import window_scores_paged, workspace_size
from uncomp.policies import LayerView, Policy
from uncomp.policies.uniform import Uniform
from uncomp.rotary import Rotary


class DeviceCompactor:
    """Chooses and moves survivors.

    Args:
        config: the server's settings.
        policy: decides scores and shares.
        caches: of this rank's attention layers.
        positions: [layers, num_blocks, heads, block_size] int32, token position of every entry that
            was kept by a compaction; lies where the entry lies.
        layer_numbers: of these layers in the whole model.
        scales, softcaps: [layers] float32 on the device, of the attention logits.
        requests: table to read from and to record in.
        arena: working memory; holds at least `least_memory` bytes.
        calibrated: [layers, heads] entropies of this rank from a calibration file, or None.
        rank: names the trace file.
        rotaries: how the keys of each layer are rotated; None: not at all.
        needs: of these layers and heads, which share one budget, in ascending order of what layers
            need; None: the policy deals every layer's part.
    """

    def __init__(
        self,
        config: UncompConfig,
        policy: Policy,
        caches: Caches,
        positions: Tensor,
        layer_numbers: Sequence[int],
        scales: Tensor,
        softcaps: Tensor,
        requests: DeviceRequests,
        arena: Arena,
        calibrated: Tensor | None = None,
        rank: int = 0,
        rotaries: Sequence[Rotary | None] | None = None,
        needs: Needs | None = None,
    ) -> None:
        self.config, self.policy, self.caches = config, policy, caches
        self.positions, self.layer_numbers = positions, list(layer_numbers)
        self.scales, self.softcaps = scales, softcaps
        self.requests, self.arena = requests, arena
        self.calibrated = None if calibrated is None else calibrated.to(caches.device)
        self.rotaries = rotaries or [None] * len(self.layer_numbers)
        self.needs = needs
        self.clock = DeviceClock(caches.device, parts=2)
        self._trace = Path(config.trace, f"kept-{rank}.jsonl") if config.trace else None
        if self._trace is not None:
            self._trace.parent.mkdir(parents=True, exist_ok=True)

    def run(self, jobs: list[Job], block_table: Tensor) -> list[Receipt]:
        """Carry out orders.

        Args:
            block_table: [rows, width] int32 on the device.

        Returns:
            One receipt an order. Times are those of earlier orders that the device has finished in
            the meantime: waiting for these would hold the engine up.
        """
        receipts = []
        for _, same in groupby(sorted(jobs, key=self._kind), self._kind):
            receipts += self._run_group(list(same), block_table)
        score, move = self.clock.collect()
        first = receipts[0]
        receipts[0] = replace(first, score_seconds=score, move_seconds=move)
        for job in jobs:
            self._write_trace(job)
        return receipts

    def _kind(self, job: Job) -> tuple[int, bool]:
        """Jobs of one kind share launches: equal windows, all compacted before or none."""
        window = 0 if job.queries is None else job.queries.shape[1]
        return window, job.order.generation > 1

    def _run_group(self, jobs: list[Job], table: Tensor) -> list[Receipt]:
        host = self._deal(jobs)
        width = self._width(jobs, host)
        needed = self._layer_bytes(jobs, width)
        if len(jobs) > 1 and needed > self.arena.size:
            half = len(jobs) // 2
            return self._run_group(jobs[:half], table) + self._run_group(jobs[half:], table)
        shares = None
        if self.requests.holdings.shared:
            orders = [job.order for job in jobs]
            shares = dealt(host, orders, (self.caches.layers, self.caches.heads), table.device)
        facts = facts_of(jobs, table, self.requests, self.caches, self.config.online_tokens)
        layers = self.caches.layers
        at_once = max(1, min(layers, self.arena.size // needed))
        if 4 < at_once < layers:
            at_once -= at_once % 4  # kernels are specialised on addresses that 16 bytes divide
        entropies = self._known_entropies(jobs)
        measured, counts, offsets = [], [], []
        for start in range(0, layers, at_once):
            stop = min(start + at_once, layers)
            self.arena.clear()
            known = None if entropies is None else entropies[start:stop]
            part = self._part(facts, start, stop, known, shares, width)
            counts.append(part[0])
            offsets.append(part[1])
            if part[2] is not None:
                measured.append(part[2])
        entropy = entropies if entropies is not None or not measured else torch.cat(measured)
        return self._record(jobs, facts, torch.cat(counts), torch.cat(offsets), entropy, host)

    def _deal(self, jobs: list[Job]) -> list[Tensor]:
        """What every order leaves, [layers, heads] int64 each; empty where the policy deals."""
        if self.needs is None or self.config.relocate:
            return []
        shape, size = (self.caches.layers, self.caches.heads), self.caches.block_size
        slots = [self.requests.slots.get(job.order.request_id) for job in jobs]
        return [
            deal_order(self.needs, job.order, slot, self.config, shape, size)
            for job, slot in zip(jobs, slots, strict=True)
        ]

    def _width(self, jobs: list[Job], host: list[Tensor]) -> int:
        """Entries that the longest dealt list of a layer can have; whole blocks."""
        most = max(len(job.order.kept_blocks) for job in jobs)
        if host:
            most = max(-(-int(counts.sum(1).max()) // self.caches.heads) for counts in host)
        return most * self.caches.heads * self.caches.block_size

    def _layer_bytes(self, jobs: list[Job], width: int) -> int:
        """Working memory that one layer of these orders takes; `width`: see `_width`."""
        caches, requests = self.caches, len(jobs)
        entries = widest(jobs, self.requests, self.caches.block_size)
        blocks = width // (caches.heads * caches.block_size)
        heads = requests * caches.heads
        window = query_heads = 0
        if jobs[0].queries is not None:
            _, window, query_heads, _ = jobs[0].queries.shape
        padded = 1 << (caches.head_size - 1).bit_length()
        parts = len(self.policy.parts())
        sizes = (
            *[4 * heads * entries] * parts,  # raw scores
            *[4 * heads * entries] * parts,  # pooled scores
            4 * heads * entries * (self.config.pooling_kind == "word"),  # places
            4 * requests * width,  # chosen
            4 * workspace_size(1, requests, query_heads, window, entries),
            8 * heads * caches.head_size**2,  # Gram and covariance; the latter is scratch later
            4 * heads * (caches.head_size**2 + 10 * padded + 16),
            scratch_bytes(caches, requests, blocks),
            # What dealing by score and combining compare; beside the arena, but as small.
            24 * heads * entries * self.policy.deals_by_score,
            32 * heads * entries * (parts - 1),
        )
        return sum(aligned(size) + 4096 for size in sizes)

    def _known_entropies(self, jobs: list[Job]) -> Tensor | None:
        """[layers, R, heads] of requests that all have one; None: to be measured, or not needed."""
        if not self.policy.needs_entropy or self.config.relocate:
            return None
        if self.calibrated is not None:
            return self.calibrated.unsqueeze(1).expand(-1, len(jobs), -1)
        slots = [self.requests.slots.get(job.order.request_id) for job in jobs]
        kept = [slot.entropy for slot in slots if slot is not None and slot.generation]
        if len(kept) == len(jobs):
            # Survivors are a biased sample: the prompt's own entropy stays in force.
            return torch.stack([cast(Tensor, entropy) for entropy in kept], 1)
        return None

    def _part(
        self,
        facts: Facts,
        start: int,
        stop: int,
        entropy: Tensor | None,
        shares: Dealt | None,
        width: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compact layers [start, stop); `shares`: where all layers share one budget.

        Returns:
            counts, offsets [l, R, H] int32, entropy [l, R, H] or None.
        """
        caches, holdings = self.caches.part(start, stop), self.requests.holdings.part(start, stop)
        config, rows = self.config, facts.rows
        positions = self.positions[start:stop]
        mark = self.clock.mark()
        terms = Terms(
            rows,
            holdings,
            positions,
            facts.full,
            facts.protect,
            config.sinks,
            config.recent_tokens,
        )
        eligible, forced = limits(terms)
        maximum = eligible.long() // caches.block_size
        given = None if shares is None or shares.counts is None else shares.counts[start:stop]
        parts = self.policy.parts()[: 1 if config.relocate else None]
        scores = [self._scores(part, facts, caches, holdings, start) for part in parts]
        raw = pooled = scores[0]
        if config.relocate:
            counts = maximum
        else:
            if self.policy.pool_scores:
                kind = cast(Pooling, config.pooling_kind)
                at = None
                if kind == "word":
                    at = entry_places(facts.places, terms, self.arena.take(raw.shape, torch.int32))
                outs = [self.arena.take(raw.shape) for _ in scores]
                for one, part, out in zip(scores, parts, outs, strict=True):
                    own, length = part.pooling(kind, config.pooling)
                    pool(one, terms, length, out, own, at)
                scores = outs
            mask = None
            by_score = self.policy.deals_by_score and given is None
            if by_score or len(scores) > 1:
                mask = torch.arange(raw.shape[-1], device=caches.device) < eligible.unsqueeze(-1)
            pooled = scores[0] if mask is None else self.policy.combine(scores, mask)
            if self.policy.needs_entropy and entropy is None and given is None:
                entropy = self._measure(facts, caches, holdings)
            if given is None:
                counts = self.policy.share(
                    entropy,
                    pooled if by_score else None,
                    mask if by_score else None,
                    (facts.kept.long() * caches.heads).expand(caches.layers, -1),
                    -(-forced.long() // caches.block_size),
                    maximum,
                    caches.block_size,
                )
        # A copy: kernels are specialised on addresses that 16 bytes divide.
        counts = counts.to(torch.int32) if given is None else given.clone()
        offsets = (counts.cumsum(-1) - counts).to(torch.int32)
        chosen = self.arena.take((caches.layers, rows.lengths.shape[0], width), torch.int32)
        choose(raw, pooled, terms, counts, offsets, chosen)
        scored = self.clock.mark()
        begins = None if shares is None else shares.begins[start:stop]
        compact(
            caches, positions, rows, holdings, chosen, counts, offsets, facts.kept_blocks,
            facts.kept, self.arena.rest(), begins=begins,
        )  # fmt: skip
        self.clock.add(mark, scored, self.clock.mark())
        return counts, offsets if begins is None else offsets + begins.unsqueeze(2), entropy

    def _scores(
        self, policy: Policy, facts: Facts, caches: Caches, holdings: Holdings, start: int
    ) -> Tensor:
        """[l, R, H, N] float32."""
        raw = self.arena.take(
            (caches.layers, facts.rows.lengths.shape[0], caches.heads, facts.entries)
        )
        if self.config.relocate:
            return raw.zero_()
        if isinstance(policy, Uniform):
            assert facts.queries is not None
            queries = facts.queries[start : start + caches.layers]
            sizes = (*queries.shape[:2], queries.shape[3], queries.shape[2], facts.entries)
            window_scores_paged(
                caches,
                facts.rows,
                holdings,
                queries,
                self.scales[start : start + caches.layers],
                self.softcaps[start : start + caches.layers],
                policy.reduce,
                raw,
                self.arena.take((workspace_size(*sizes),)),
                over=policy.over,
            )
            return raw
        for layer in range(caches.layers):
            for row in range(raw.shape[1]):
                view = self._view(facts, start + layer, row)
                raw[layer, row, :, : view.keys.shape[1]] = policy.score(view)
        return raw

    def _view(self, facts: Facts, layer: int, row: int) -> LayerView:
        """A dense copy of one layer of one request, for policies without a kernel."""
        holdings, caches = self.requests.holdings, self.caches
        keys, _, lengths = gather(caches, facts.rows, holdings, row, layer)
        tail = facts.rows.lengths[row] - lengths[:, None]
        positions = torch.arange(keys.shape[1], device=keys.device) + tail
        stored = stored_sub_blocks(facts.rows, holdings, row, layer).tolist()
        for head, count in enumerate(stored):
            at = sub_blocks(facts.rows, holdings, row, layer, head, count)
            kept = self.positions[at.unbind(1)].flatten()
            positions[head, : kept.shape[0]] = kept
        return LayerView(
            self.layer_numbers[layer], keys, lengths, positions, rotary=self.rotaries[layer],
        )  # fmt: skip

    def _measure(self, facts: Facts, caches: Caches, holdings: Holdings) -> Tensor:
        """Entropies of the heads from their own keys, [l, R, H]."""
        shape = (caches.layers, facts.rows.lengths.shape[0], caches.heads)
        heads, size = math.prod(shape), caches.head_size
        padded = 1 << (size - 1).bit_length()
        take = self.arena.take
        grams = GramBuffers(
            take((*shape, size)), take((*shape, size, size)), take((*shape, size)),
            take(shape, torch.int32),
        )  # fmt: skip
        gram_paged(caches, facts.rows, holdings, facts.stride, grams)
        matrices = covariance(grams, take((*shape, size, size))).view(heads, size, size)
        scratch = Scratch(
            take((heads, size, size)), take((heads, 4, padded)), take((heads, size)),
            take((heads, size)), take((heads, size)),
        )  # fmt: skip
        measure = cast(Measure, self.config.measure)
        entropy = spectral_entropy(matrices, self.config.truncation, measure, scratch)
        return entropy.view(shape)

    def _record(
        self,
        jobs: list[Job],
        facts: Facts,
        counts: Tensor,
        offsets: Tensor,
        entropy: Tensor | None,
        host: list[Tensor],
    ) -> list[Receipt]:
        receipts, slots = [], []
        layers, heads, size = self.caches.layers, self.caches.heads, self.caches.block_size
        for i, job in enumerate(jobs):
            order = job.order
            old = self.requests.slots.get(order.request_id)
            most = order.full_blocks
            before = [most * heads] * layers
            if old is not None:
                most = old.most + order.full_blocks - old.full_blocks
                before = [n + (order.full_blocks - old.full_blocks) * heads for n in old.held]
            index = old.index if old is not None else self.requests.take()
            own = None if entropy is None else entropy[:, i].clone()
            each = len(order.kept_blocks) * heads
            held = tuple(min(each, n) for n in before)
            known = host[i] if host else None
            if known is not None:
                held, most = tuple(known.sum(1).tolist()), int(known.max())
            self.requests.slots[order.request_id] = DeviceSlot(
                index, order.generation, order.full_blocks, held, min(most, each * layers), own,
                known,
            )  # fmt: skip
            slots.append(index)
            tail = (order.num_tokens - order.full_blocks * size) * layers * heads
            seen, left = sum(before) * size + tail, sum(held) * size + tail
            receipts.append(
                Receipt(order.request_id, order.generation, seen, left, 0.0, 0.0, layers * heads)
            )
        at = to_device(slots, torch.int64, self.caches.device)
        holdings = self.requests.holdings
        holdings.counts.index_copy_(1, at, counts)
        holdings.offsets.index_copy_(1, at, offsets)
        holdings.spans.index_copy_(0, at, torch.stack([facts.full - facts.kept, facts.full], 1))
        return receipts

    def _write_trace(self, job: Job) -> None:
        if self._trace is not None:
            slot = self.requests.slots[job.order.request_id]
            holdings, numbers = self.requests.holdings, self.layer_numbers
            write_trace(self._trace, job.order, holdings, slot.index, self.positions, numbers)
