"""Compactions of random caches against a reference that works entry by entry, head by head."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from uncomp import policies
from uncomp.config import UncompConfig
from uncomp.engine import compactor
from uncomp.engine.compactor import Compactor, LayerCache
from uncomp.engine.cpu_layout import CacheLayout, HalfLayout
from uncomp.engine.orders import Order
from uncomp.engine.settings import make_policy
from uncomp.engine.state import CompressedRequests
from uncomp.kernels.entropy import spectrum, truncated_entropy
from uncomp.kernels.gram import gram
from uncomp.policies import LayerView

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

    def __init__(self, config: UncompConfig, layout: CacheLayout, tokens: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.config, self.layout, self.tokens = config, layout, tokens
        self.random = random.Random(seed)
        shape = (BLOCKS, HEADS, SIZE, 2 * DIM)
        # Slots that hold no token are NaN: whoever looks at one is found out.
        self.caches = [torch.full(shape, math.nan, dtype=torch.float64) for _ in range(LAYERS)]
        self.row = self.random.sample(range(1, BLOCKS), 20)
        self.held: list[list[Head]] = [[[] for _ in range(HEADS)] for _ in range(LAYERS)]
        for position in range(tokens):
            self.append(position)
        self.requests = CompressedRequests(LAYERS, HEADS, SIZE)
        self.policy = make_policy(config)
        layers = [LayerCache(7 + i, cache, 0.3, 0.0) for i, cache in enumerate(self.caches)]
        self.compactor = Compactor(config, self.policy, layers, layout, self.requests)
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
        return Order("r", self.tokens, full, tuple(kept), generation, protect)

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
        for layer in range(LAYERS):
            tokens = order.full_blocks * SIZE
            sub_blocks, lengths, positions = self.requests.entries(slot, layer, tokens)
            used: list[int] = []
            for head in range(HEADS):
                kept = [e for e in self.held[layer][head] if e[0] < tokens]
                assert lengths[head] == len(kept)
                assert positions[head, : len(kept)].tolist() == [e[0] for e in kept]
                numbers = sub_blocks[head, : len(kept) // SIZE]
                used += numbers.tolist()
                halves = CacheLayout.halves(self.caches[layer])[numbers]
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
        recent = order.num_tokens - self.config.window
        parts = [torch.full((HEADS, width), -math.inf).double() for _ in scores]
        eligible = torch.zeros(HEADS, width)
        forced: list[set[int]] = []
        for h, head in enumerate(heads):
            forced.append(set())
            poolable = [e for e, (p, *_) in enumerate(head) if p < recent]
            for e, (position, *_) in enumerate(head):
                inside = position < order.full_blocks * SIZE
                eligible[h, e] = inside
                spans = any(a <= position < b for a, b in order.protect)
                if inside and (position < self.config.sinks or position >= recent or spans):
                    forced[h].add(e)
                for pooled, own in zip(parts, scores, strict=True):
                    if not self.policy.pool_scores:
                        pooled[h, e] = own[h][e]
                    elif e in poolable:
                        pooled[h, e] = self.pooled(own[h], e, poolable)
        pooled = parts[0] if len(parts) == 1 else self.in_turns(*parts, eligible)
        least = torch.tensor([-(-len(f) // SIZE) for f in forced])
        most = eligible.sum(1).long() // SIZE
        total = len(order.kept_blocks) * HEADS
        deal = self.policy.deal(view, pooled, eligible.bool(), total, least, most, SIZE)
        assert int(deal.sum()) == min(total, int(most.sum()))
        kept = []
        for h, head in enumerate(heads):
            free = [e for e in range(len(head)) if eligible[h, e] and e not in forced[h]]
            free.sort(key=lambda e, h=h: (-pooled[h, e].item(), -raw[h][e], e))
            chosen = forced[h] | set(free[: int(deal[h]) * SIZE - len(forced[h])])
            kept.append([head[e] for e in sorted(chosen)])
        return kept

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

    def pooled(self, raw: list[float], entry: int, poolable: list[int]) -> float:
        length = self.config.pooling
        if self.config.pooling_kind == "max":
            near = range(entry - length // 2, entry + length // 2 + 1)
            return max(raw[other] for other in near if other in poolable)
        total = 0.0
        for other in poolable:
            far, fall = abs(entry - other), length if other <= entry else max(1.0, length / 2)
            if far < 1 << math.ceil(math.log2(4 * fall)):
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", policies.NAMES)
def test_first_and_later_compactions(policy: str, layout: str) -> None:
    for seed in range(3):
        rng = random.Random(seed)
        bench = Bench(config(policy=policy), LAYOUTS[layout], rng.randint(24, 48), seed)
        # The generation after a short tail, after a long one, and right away.
        for growth in (0, rng.randint(5, 9), rng.randint(9, 14), SIZE):
            for _ in range(growth):
                bench.append(bench.tokens)
                bench.tokens += 1
            held = len(bench.held[0][0]) // SIZE
            protect = rng.choice([(), ((0, 5),), ((3, 6), (9, 12))])
            forced = 2 + 3 + sum(b - a for a, b in protect)
            keep = rng.randint(-(-forced // SIZE), max(-(-forced // SIZE), held - 1))
            if bench.requests.slots and protect:
                protect = ()  # a request's protected spans do not change: these may be gone
            bench.run(bench.order(keep, protect, exchange=rng.random() < 0.5))


@pytest.mark.parametrize("policy", ["adakv", "uniform"])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_scores_are_handed_on(policy: str, length: int) -> None:
    given = config(policy=policy, pooling=length, pooling_kind="ema", window_reduce="sum")
    bench = Bench(given, LAYOUTS["plain"], 41, length)
    for growth in (0, 7):
        for _ in range(growth):
            bench.append(bench.tokens)
            bench.tokens += 1
        bench.run(bench.order(5, (), exchange=True))


def test_a_floor_evens_shares_by_score_out() -> None:
    def spread(floor: float) -> int:
        bench = Bench(config(policy="adakv", floor=floor), LAYOUTS["plain"], 44, seed=1)
        bench.run(bench.order(5, (), exchange=False))
        held = [[len(head) for head in layer] for layer in bench.held]
        return max(max(counts) - min(counts) for counts in held)

    assert spread(1.0) == 0
    assert spread(0.0) > 0


@pytest.mark.parametrize("policy", ["entropy", "adakv", "key_norm"])
def test_groups_of_layers_are_compacted_alike(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compactor, "_GROUP", 1)
    bench = Bench(config(policy=policy), LAYOUTS["transposed-keys"], 37, 4)
    for growth in (0, 7):
        for _ in range(growth):
            bench.append(bench.tokens)
            bench.tokens += 1
        bench.run(bench.order(5, ((3, 6),) if not growth else (), exchange=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_relocation_drops_nothing_and_moves_everything(layout: str) -> None:
    bench = Bench(config(relocate=True, policy="uniform"), LAYOUTS[layout], 30, 0)
    for growth in (0, 6, 5):
        for _ in range(growth):
            bench.append(bench.tokens)
            bench.tokens += 1
        full = bench.tokens // SIZE
        generation = 1 + (bench.requests.slots["r"].generation if growth else 0)
        order = Order("r", bench.tokens, full, tuple(bench.row[:full]), generation)
        queries = torch.randn(LAYERS, 3, HEADS * GROUP, DIM, dtype=torch.float64)
        receipt = bench.compactor.run(order, torch.tensor(bench.row), queries)
        assert receipt.tokens_kept == receipt.tokens_seen == bench.tokens * HEADS * LAYERS
        bench.check(order)  # every entry, in the old order
        if not growth:
            numbers = bench.requests.entries(bench.requests.slots["r"], 0, full * SIZE)[0]
            own = torch.tensor(bench.row[:full]) * HEADS + torch.arange(HEADS).unsqueeze(1)
            # Dealing in reverse may leave one of each head where it was.
            assert int((numbers == own).sum()) <= HEADS


def test_destinations_may_be_the_sources() -> None:
    """Everything is kept where it was: reading after writing would mix the heads up."""
    bench = Bench(config(policy="streaming", pooling=1), LAYOUTS["permuted"], 40, 3)
    bench.run(bench.order(9, (), exchange=False))
    bench.run(bench.order(9, (), exchange=False))
    assert [len(head) for head in bench.held[0]] == [36] * HEADS


def test_survivors_are_the_protected_and_the_recent_when_nothing_else_fits() -> None:
    bench = Bench(config(policy="random", sinks=2, window=4), LAYOUTS["plain"], 40, 5)
    bench.run(bench.order(3, ((10, 16),), exchange=True))
    for layer in bench.held:
        for head in layer:
            assert [p for p, *_ in head] == [0, 1, *range(10, 16), *range(36, 40)]


def test_more_forced_than_fits_is_an_error() -> None:
    bench = Bench(config(policy="random"), LAYOUTS["plain"], 40, 5)
    order = bench.order(2, ((10, 16),), exchange=False)
    with pytest.raises(ValueError, match=r"need \[9, 9\] but only \[6, 6\] are to be dealt"):
        bench.compactor.run(order, torch.tensor(bench.row), None)


def test_trace_names_every_kept_position(tmp_path: Path) -> None:
    traced = config(policy="random", trace=str(tmp_path / "trace"))
    bench = Bench(traced, LAYOUTS["plain"], 30, 0)
    bench.run(bench.order(4, (), exchange=False))
    (line,) = (tmp_path / "trace" / "kept-0.jsonl").read_text().splitlines()
    record = json.loads(line)
    numbers = (record["num_tokens"], record["full_blocks"], record["block_size"])
    assert numbers == (30, 7, SIZE)
    held = [[[p for p, *_ in head if p < 28] for head in layer] for layer in bench.held]
    assert record["kept"] == held
