"""The worker's tables against lists: random requests with unequal heads come, grow and go."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

from uncomp.engine.orders import Order
from uncomp.engine.state import CompressedRequests

LAYERS, HEADS, SIZE = 2, 3, 4


@dataclass
class Naive:
    """One request: per layer and head the sub-blocks and the positions in them."""

    order: Order
    row: list[int]
    kept: list[list[list[int]]]
    positions: list[list[list[int]]]
    entropy: torch.Tensor | None
    blocks: int = field(default=0)

    def numbers(self, layer: int, head: int, blocks: int) -> list[int]:
        tail = self.row[self.order.full_blocks : blocks]
        return self.kept[layer][head] + [block * HEADS + head for block in tail]


class Model:
    """Does everything twice, once in tables and once in lists."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.tables = CompressedRequests(LAYERS, HEADS, SIZE)
        self.naive: dict[str, Naive] = {}

    def place(self, name: str) -> None:
        known = self.naive.get(name)
        row = known.row if known else [self.random.randrange(1, 900) for _ in range(60)]
        first = known.blocks if known else 1
        full = self.random.randint(first, first + 6)
        kept_blocks = self.random.randint(1, full)
        kept, positions = [], []
        for _ in range(LAYERS):
            counts = self._deal(kept_blocks * HEADS, full)
            numbers = self.random.sample(range(3000), sum(counts))
            kept.append([[numbers.pop() for _ in range(n)] for n in counts])
            positions.append(
                [sorted(self.random.sample(range(full * SIZE), n * SIZE)) for n in counts]
            )
        generation = known.order.generation + 1 if known else 1
        order = Order(name, full * SIZE, full, tuple(row[full - kept_blocks : full]), generation)
        entropy = torch.rand(LAYERS, HEADS) if self.random.random() < 0.5 else None
        width = max(len(n) for layer in kept for n in layer)
        self.tables.place(
            name,
            order.generation,
            order.full_blocks,
            torch.tensor([[len(n) for n in layer] for layer in kept]),
            _padded(kept, width),
            _padded(positions, width * SIZE).int(),
            entropy,
        )
        self.naive[name] = Naive(order, row, kept, positions, entropy, full)

    def grow(self, name: str) -> None:
        """Up to three blocks more; the rest of the row is not to be looked at."""
        naive = self.naive[name]
        naive.blocks = min(naive.blocks + self.random.randint(0, 3), len(naive.row))
        shown = torch.tensor(naive.row[: naive.blocks] + [10**6] * 3, dtype=torch.int32)
        shown[: naive.order.first_kept] = -1  # stale in the worker: freed blocks
        self.tables.extend(self.tables.slots[name], shown, naive.blocks)

    def drop(self, name: str) -> None:
        self.tables.drop(name)
        self.naive.pop(name, None)

    def length(self, name: str) -> int:
        """Some number of tokens that needs exactly the blocks covered so far."""
        naive = self.naive[name]
        last = self.random.randint(1, SIZE) if naive.blocks > naive.order.full_blocks else SIZE
        return (naive.blocks - 1) * SIZE + last

    def check(self) -> None:
        assert set(self.tables.slots) == set(self.naive)
        assert len(self.tables) == len(self.naive)
        names = [n for n in self.naive if self.random.random() < 0.7]
        if self.random.random() < 0.5:
            self.random.shuffle(names)
        if names:
            self.check_batch(names)
        for name in names:
            self.check_entries(name)

    def check_batch(self, names: list[str]) -> None:
        lengths = [self.length(name) for name in names]
        slots = [self.tables.slots[name] for name in names]
        batch = self.tables.batch(slots, torch.tensor(lengths, dtype=torch.int32))
        assert batch.lengths.dtype == batch.tables.dtype == torch.int32
        assert batch.lengths.shape == (LAYERS, len(names) * HEADS)
        assert batch.tables.is_contiguous()
        for layer in range(LAYERS):
            for i, name in enumerate(names):
                naive = self.naive[name]
                for head in range(HEADS):
                    wanted = naive.numbers(layer, head, naive.blocks)
                    tail = lengths[i] - naive.order.full_blocks * SIZE
                    sequence = i * HEADS + head
                    tokens = len(naive.kept[layer][head]) * SIZE + tail
                    assert batch.lengths[layer, sequence] == tokens
                    assert batch.tables[layer, sequence, : len(wanted)].tolist() == wanted

    def check_entries(self, name: str) -> None:
        naive, slot, tokens = self.naive[name], self.tables.slots[name], self.length(name)
        assert (slot.generation, slot.num_blocks) == (naive.order.generation, naive.blocks)
        assert slot.entropy is naive.entropy
        assert self.tables.kept_positions(slot) == naive.positions
        for layer in range(LAYERS):
            sub_blocks, lengths, positions = self.tables.entries(slot, layer, tokens)
            for head in range(HEADS):
                tail = list(range(naive.order.full_blocks * SIZE, tokens))
                wanted = naive.positions[layer][head] + tail
                assert lengths[head] == len(wanted)
                assert positions[head, : len(wanted)].tolist() == wanted
                numbers = naive.numbers(layer, head, -(-tokens // SIZE))
                assert sub_blocks[head, : len(numbers)].tolist() == numbers
                assert not sub_blocks[head, len(numbers) :].any(), "padding is the null block"

    def _deal(self, total: int, most: int) -> list[int]:
        counts = [0] * HEADS
        while sum(counts) < min(total, most * HEADS):
            head = self.random.choice([h for h in range(HEADS) if counts[h] < most])
            room = min(most - counts[head], min(total, most * HEADS) - sum(counts))
            counts[head] += self.random.randint(1, room)
        return counts


def _padded(lists: list[list[list[int]]], width: int) -> torch.Tensor:
    return torch.tensor([[n + [0] * (width - len(n)) for n in layer] for layer in lists])


@pytest.mark.parametrize("seed", range(12))
def test_tables_equal_lists(seed: int) -> None:
    model = Model(seed)
    for _ in range(60):
        name = f"r{model.random.randrange(9)}"
        act = model.random.choice(["place", "grow", "grow", "grow", "drop"])
        if act == "place":
            model.place(name)
        elif name in model.naive and act == "grow":
            model.grow(name)
        elif act == "drop" and model.random.random() < 0.4:
            model.drop(name)
        model.check()


def test_slots_are_used_again() -> None:
    model = Model(0)
    for i in range(50):
        model.place(f"r{i}")
        model.check()
        model.drop(f"r{i}")
    assert model.tables._table.shape[1] == 4


def test_dropping_an_unknown_request_is_fine() -> None:
    requests = CompressedRequests(LAYERS, HEADS, SIZE)
    requests.drop("never seen")
    assert "never seen" not in requests
    assert len(requests) == 0
