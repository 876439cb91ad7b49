"""Compactions of random caches against a reference that works entry by entry, head by head."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from compaction_bench import DIM, GROUP, HEADS, LAYERS, LAYOUTS, SIZE, Bench, config

from uncomp import policies
from uncomp.engine import compactor
from uncomp.engine.orders import Order
from uncomp.importance import Importance


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


@pytest.mark.parametrize("policy", ["adakv", "hybrid", "random"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_share_one_budget(policy: str, layout: str) -> None:
    """Some heads keep nearly everything, in other layers' places; compacted again, they move."""
    for seed in range(6):
        rng = random.Random(seed)
        shares = torch.tensor([rng.random() ** 3 for _ in range(LAYERS * HEADS)]).double()
        importance = Importance((0.5,), shares.view(1, LAYERS, HEADS))
        given = config(policy=policy, shares="calibrated", calibration="file")
        bench = Bench(given, LAYOUTS[layout], rng.randint(32, 48), seed, importance)
        moved = 0
        for growth in (0, rng.randint(5, 9), SIZE):
            for _ in range(growth):
                bench.append(bench.tokens)
                bench.tokens += 1
            mean = sum(len(head) for layer in bench.held for head in layer) // LAYERS // HEADS
            keep = rng.randint(2, max(2, mean // SIZE - 1))
            bench.run(bench.order(keep, (), exchange=rng.random() < 0.5))
            counts = bench.requests._kept[:, 0].sum(1)
            moved += int((counts - keep * HEADS).clamp_min(0).sum())
        assert moved > 0


@pytest.mark.parametrize("recent", [1, 7])
@pytest.mark.parametrize("policy", ["adakv", "hybrid", "streaming"])
def test_what_stays_need_not_be_the_window(policy: str, recent: int) -> None:
    bench = Bench(config(policy=policy, recent=recent), LAYOUTS["plain"], 42, recent)
    for growth in (0, 7):
        for _ in range(growth):
            bench.append(bench.tokens)
            bench.tokens += 1
        bench.run(bench.order(5, (), exchange=True))
        for head in bench.held[0]:
            last = [p for p, *_ in head if p >= bench.tokens - recent]
            assert last == [*range(bench.tokens - recent, bench.tokens)]


@pytest.mark.parametrize("policy", ["adakv", "uniform", "hybrid"])
@pytest.mark.parametrize("kind", ["ema", "word"])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_scores_are_handed_on(policy: str, kind: str, length: int) -> None:
    given = config(policy=policy, pooling=length, pooling_kind=kind, window_reduce="sum")
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
