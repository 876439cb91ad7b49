"""A worker's cache with one request in it, and what it should hold as lists of entries."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

from uncomp.config import UncompConfig
from uncomp.engine.compactor import Compactor, LayerCache
from uncomp.engine.cpu_layout import CacheLayout, HalfLayout
from uncomp.engine.one_piece import in_one_piece
from uncomp.engine.orders import Order
from uncomp.engine.settings import make_policy
from uncomp.engine.state import CompressedRequests
from uncomp.importance import Importance, deal
from uncomp.kernels.entropy import spectrum, truncated_entropy
from uncomp.kernels.gram import gram
from uncomp.kernels.select import BREAK, UNIT
from uncomp.policies import LayerView, Policy
from uncomp.spans import SENTENCE

BLOCKS, LAYERS, HEADS, GROUP, SIZE, DIM = 40, 2, 3, 2, 4, 6
Head = list[tuple[int, Tensor, Tensor]]  # position, key, value, in cache order


def layouts() -> dict[str, CacheLayout]:
    order = torch.arange(SIZE * DIM)
    shuffled = torch.randperm(SIZE * DIM, generator=torch.Generator().manual_seed(1))
    plain = HalfLayout.of(order.view(SIZE, DIM))
    transposed = HalfLayout.of(order.view(DIM, SIZE).T)
    permuted = HalfLayout.of(shuffled.view(SIZE, DIM))
    kinds = (plain.kind, transposed.kind, permuted.kind)
    assert kinds == ("plain", "transposed", "permuted")
    return {
        "plain": CacheLayout(plain, plain),
        "transposed-keys": CacheLayout(transposed, plain),
        "permuted": CacheLayout(permuted, transposed),
    }


LAYOUTS = layouts()


class Bench:
    """A worker's cache with one request in it, and what the request holds as lists."""

    def __init__(
        self,
        config: UncompConfig,
        layout: CacheLayout,
        tokens: int,
        seed: int,
        importance: Importance | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.importance = importance
        self.config, self.layout, self.tokens = config, layout, tokens
        self.random = random.Random(seed)
        shape = (BLOCKS, HEADS, SIZE, 2 * DIM)
        # Slots that hold no token are NaN: whoever looks at one is found out.
        gap = 3  # blocks between layers that belong to nobody
        piece = torch.full((LAYERS * (BLOCKS + gap), *shape[1:]), math.nan, dtype=torch.float64)
        self.caches = [piece[i * (BLOCKS + gap) :][:BLOCKS] for i in range(LAYERS)]
        self.joined, bases = self.caches, torch.zeros(LAYERS, dtype=torch.int64)
        if importance is not None:
            joined, bases = in_one_piece(self.caches)  # type: ignore[misc]
            self.joined = [joined] * LAYERS
        self.row = self.random.sample(range(1, BLOCKS), 20)
        self.held: list[list[Head]] = [[[] for _ in range(HEADS)] for _ in range(LAYERS)]
        for position in range(tokens):
            self.append(position)
        self.bases = bases * HEADS
        self.requests = CompressedRequests(LAYERS, HEADS, SIZE, self.bases)
        self.policy = make_policy(config)
        layers = [LayerCache(7 + i, cache, 0.3, 0.0) for i, cache in enumerate(self.joined)]
        self.compactor = Compactor(
            config, self.policy, layers, layout, self.requests, None, importance
        )
        self.entropy: list[Tensor | None] = [None] * LAYERS

    def append(self, position: int) -> None:
        for layer, cache in enumerate(self.caches):
            halves = cache.view(BLOCKS, HEADS, 2, SIZE * DIM)
            for head in range(HEADS):
                key, value = torch.randn(2, DIM, dtype=torch.float64)
                at = halves[self.row[position // SIZE], head]
                at[0, self.layout.key.offsets[position % SIZE]] = key
                at[1, self.layout.value.offsets[position % SIZE]] = value
                self.held[layer][head].append((position, key, value))

    def order(self, keep: int, protect: tuple[tuple[int, int], ...], exchange: bool) -> Order:
        """With ``exchange`` some destinations are blocks outside the row, as for shared blocks."""
        slot = self.requests.slots.get("r")
        full = self.tokens // SIZE
        kept = self.row[full - keep : full]
        if exchange:
            free = [b for b in range(1, BLOCKS) if b not in self.row]
            kept = [self.random.choice([b, free.pop()]) for b in kept]
        generation = slot.generation + 1 if slot else 1
        gaps = [SENTENCE if p % 11 == 5 else p % 3 % 2 for p in range(self.tokens)]
        return Order("r", self.tokens, full, tuple(kept), generation, protect, None, bytes(gaps))

    def run(self, order: Order) -> None:
        """Compact, and compare everything with the reference."""
        queries = None
        if self.policy.needs_queries:
            window = min(self.config.window, order.num_tokens)
            queries = torch.randn(LAYERS, window, HEADS * GROUP, DIM, dtype=torch.float64)
        wanted = [self.survivors(order, i, queries) for i in range(LAYERS)]
        seen = sum(len(head) for layer in self.held for head in layer)
        untouched = set(range(BLOCKS)) - set(order.kept_blocks)
        before = [cache[sorted(untouched)].clone() for cache in self.caches]
        row = torch.tensor(self.row[: -(-order.num_tokens // SIZE)] + [10**6] * 3)
        if order.generation > 1:
            row[: self.requests.slots["r"].full_blocks] = 10**6  # stale in the worker
        receipt = self.compactor.run(order, row, queries)
        for cache, old in zip(self.caches, before, strict=True):
            torch.testing.assert_close(cache[sorted(untouched)], old, equal_nan=True)
        tail = order.full_blocks * SIZE
        for layer in range(LAYERS):
            for head in range(HEADS):
                rest = [e for e in self.held[layer][head] if e[0] >= tail]
                self.held[layer][head] = wanted[layer][head] + rest
        self.check(order)
        kept = sum(len(head) for layer in self.held for head in layer)
        assert (receipt.request_id, receipt.generation) == ("r", order.generation)
        assert (receipt.tokens_seen, receipt.tokens_kept) == (seen, kept)
        # What the cache no longer holds: the blocks before the kept ones.
        for block in set(self.row[: order.first_kept]) - set(order.kept_blocks):
            for cache in self.caches:
                cache[block] = math.nan

    def check(self, order: Order) -> None:
        """The cache holds exactly the entries of the lists, in order, in the dealt blocks."""
        slot = self.requests.slots["r"]
        allowed = {b * HEADS + h for b in order.kept_blocks for h in range(HEADS)}
        is_shared, used = self.importance is not None, list[int]()
        if is_shared:
            allowed = {int(base) + n for base in self.bases for n in allowed}
        for layer in range(LAYERS):
            tokens = order.full_blocks * SIZE
            sub_blocks, lengths, positions = self.requests.entries(slot, layer, tokens)
            used = used if is_shared else []
            for head in range(HEADS):
                kept = [e for e in self.held[layer][head] if e[0] < tokens]
                assert lengths[head] == len(kept)
                assert positions[head, : len(kept)].tolist() == [e[0] for e in kept]
                numbers = sub_blocks[head, : len(kept) // SIZE]
                used += numbers.tolist()
                halves = CacheLayout.halves(self.joined[layer])[numbers]
                for half, part, index in ((0, self.layout.key, 1), (1, self.layout.value, 2)):
                    stored = halves[:, half][:, part.offsets.flatten()].view(-1, DIM)
                    wanted = [e[index] for e in kept]
                    assert torch.equal(stored, torch.stack(wanted) if wanted else stored)
            assert len(used) == len(set(used)), "a sub-block was dealt twice"
            assert set(used) <= allowed

    def survivors(self, order: Order, layer: int, queries: Tensor | None) -> list[Head]:
        """What a layer should keep, from the lists."""
        view = self.view(order, layer, queries)
        heads = self.held[layer]
        width = view.keys.shape[1]
        scores = [part.score(view).tolist() for part in self.policy.parts()]
        raw = scores[0]
        recent = order.num_tokens - self.config.recent_tokens
        parts = [torch.full((HEADS, width), -math.inf).double() for _ in scores]
        eligible = torch.zeros(HEADS, width)
        forced: list[set[int]] = []
        for h, head in enumerate(heads):
            forced.append(set())
            poolable = [e for e, (p, *_) in enumerate(head) if p < recent]
            stand = [p for p, *_ in head]
            if self.config.pooling_kind == "word":
                steps = [(1, UNIT, BREAK)[gap] for gap in order.gaps]
                stand = [sum(steps[: p + 1]) for p in stand]
            for e, (position, *_) in enumerate(head):
                inside = position < order.full_blocks * SIZE
                eligible[h, e] = inside
                spans = any(a <= position < b for a, b in order.protect)
                if inside and (position < self.config.sinks or position >= recent or spans):
                    forced[h].add(e)
                for pooled, own, part in zip(parts, scores, self.policy.parts(), strict=True):
                    if not self.policy.pool_scores:
                        pooled[h, e] = own[h][e]
                    elif e in poolable:
                        pooled[h, e] = self.pooled(part, own[h], e, poolable, stand)
        pooled = parts[0] if len(parts) == 1 else self.in_turns(*parts, eligible)
        least = torch.tensor([-(-len(f) // SIZE) for f in forced])
        most = eligible.sum(1).long() // SIZE
        total = len(order.kept_blocks) * HEADS
        if self.importance is None:
            deal = self.policy.deal(view, pooled, eligible.bool(), total, least, most, SIZE)
            assert int(deal.sum()) == min(total, int(most.sum()))
        else:
            deal = self.shared_deal(order)[layer]
        kept = []
        for h, head in enumerate(heads):
            free = [e for e in range(len(head)) if eligible[h, e] and e not in forced[h]]
            free.sort(key=lambda e, h=h: (-pooled[h, e].item(), -raw[h][e], e))
            chosen = forced[h] | set(free[: int(deal[h]) * SIZE - len(forced[h])])
            kept.append([head[e] for e in sorted(chosen)])
        return kept

    def shared_deal(self, order: Order) -> Tensor:
        """What the heads of all layers get, from the lists."""
        assert self.importance is not None
        end, recent = order.full_blocks * SIZE, order.num_tokens - self.config.recent_tokens
        least = torch.zeros(LAYERS, HEADS, dtype=torch.int64)
        most = torch.zeros_like(least)
        for layer, heads in enumerate(self.held):
            for h, head in enumerate(heads):
                inside = [p for p, *_ in head if p < end]
                forced = [
                    p
                    for p in inside
                    if p < self.config.sinks
                    or p >= recent
                    or any(a <= p < b for a, b in order.protect)
                ]
                most[layer, h], least[layer, h] = len(inside) // SIZE, -(-len(forced) // SIZE)
        total = len(order.kept_blocks) * HEADS * LAYERS
        found = deal(self.importance, total, least, most, self.config.least_share)
        assert int(found.sum()) == min(total, int(most.sum()))
        return found

    def in_turns(self, attention: Tensor, keys: Tensor, eligible: Tensor) -> Tensor:
        """The hybrid policy's: the earlier an entry is in one of two lists, the better."""
        result = torch.full_like(attention, -math.inf)
        share = self.config.attention_share
        for h in range(HEADS):
            among = [e for e in range(eligible.shape[1]) if eligible[h, e]]
            for scores, part in ((attention, share), (keys, 1 - share)):
                ranked = sorted(among, key=lambda e, s=scores[h]: (-s[e].item(), e))
                for rank, e in enumerate(ranked):
                    result[h, e] = max(result[h, e].item(), -rank / part)
        return result

    def pooled(
        self, part: Policy, raw: list[float], entry: int, poolable: list[int], stand: list[int]
    ) -> float:
        length, kind = self.config.pooling, self.config.pooling_kind
        if kind == "word" and part.name == "prerope_key_difference":
            length, kind = 4 * length, "ema"
        if kind == "max":
            near = range(entry - length // 2, entry + length // 2 + 1)
            return max(raw[other] for other in near if other in poolable)
        total = 0.0
        for other in poolable:
            fall = length if other <= entry else max(1.0, length / 2)
            far, last = abs(entry - other), 4 * fall
            if far >= 1 << math.ceil(math.log2(4 * last if kind == "word" else last)):
                continue
            if kind == "word":
                far = abs(stand[entry] - stand[other])
                fall *= UNIT
                if far >= BREAK:
                    continue
            total += math.exp(-far / fall) * raw[other]
        return total

    def view(self, order: Order, layer: int, queries: Tensor | None) -> LayerView:
        heads = self.held[layer]
        width = -(-max(map(len, heads)) // SIZE) * SIZE
        keys = torch.full((HEADS, width, DIM), math.nan, dtype=torch.float64)
        positions = torch.zeros(HEADS, width, dtype=torch.int64)
        for h, head in enumerate(heads):
            keys[h, : len(head)] = torch.stack([key for _, key, _ in head])
            positions[h, : len(head)] = torch.tensor([p for p, *_ in head])
        lengths = torch.tensor([len(head) for head in heads])
        if self.policy.needs_entropy and self.entropy[layer] is None:
            # From the prompt, at the first compaction, and from then on.
            stride = max(1, math.ceil(width / self.config.online_tokens))
            spread = spectrum(gram(keys, lengths, stride).covariance())
            self.entropy[layer] = truncated_entropy(
                spread,
                self.config.truncation,
                self.config.measure,  # type: ignore[arg-type]
            )
        grouped, at = None, torch.zeros(0, dtype=torch.int64)
        if queries is not None:
            window = queries.shape[1]
            grouped = torch.stack(
                [queries[layer, :, h * GROUP : (h + 1) * GROUP].transpose(0, 1) for h in range(3)]
            )
            at = torch.arange(order.num_tokens - window, order.num_tokens)
        return LayerView(
            7 + layer, keys, lengths, positions, grouped, at, 0.3, 0.0, self.entropy[layer]
        )


def config(**given: Any) -> UncompConfig:
    # Of a single eigenvalue, a quarter of this head size, the renormalized entropy is always 0.
    base = {"keep": 0.5, "window": 3, "sinks": 2, "groups": 3, "truncation": 4}
    pooling = {"pooling": 3, "pooling_kind": "max"}
    return UncompConfig.from_mapping({"online_tokens": 64, **pooling, **base, **given})
