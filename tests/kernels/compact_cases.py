"""Random compactions, for the tests of the reference and of the Triton version."""

from __future__ import annotations

from dataclasses import dataclass, replace

import paged_cases
import torch
from torch import Tensor

from uncomp.importance import in_order
from uncomp.kernels.compact.launch import scratch_bytes
from uncomp.kernels.paged import Caches, Holdings, Rows, head_lengths

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GARBAGE = 2**30  # an index that must not be followed


@dataclass
class Job:
    """Arguments of one compaction, and what it does to the requests."""

    caches: Caches
    positions: Tensor
    rows: Rows
    holdings: Holdings
    chosen: Tensor
    counts: Tensor
    offsets: Tensor
    kept_blocks: Tensor
    kept_count: Tensor
    first: Tensor
    full: Tensor
    begins: Tensor | None = None

    @property
    def arguments(self):
        return (
            *(self.caches, self.positions, self.rows, self.holdings, self.chosen, self.counts),
            *(self.offsets, self.kept_blocks, self.kept_count),
        )

    @property
    def options(self):
        return {} if self.begins is None else {"begins": self.begins}

    def copy(self) -> Job:
        tensors = [t.clone() for t in self.caches.tensors]
        return replace(self, caches=Caches.of(tensors), positions=self.positions.clone())

    def scratch(self, layers: int | None = None) -> Tensor:
        layers = self.caches.layers if layers is None else layers
        requests, blocks = self.kept_blocks.shape[:2]
        if self.begins is not None:  # a layer can keep more than its own blocks hold
            blocks = -(-self.chosen.shape[2] // (self.caches.heads * self.caches.block_size))
        size = scratch_bytes(self.caches, requests, blocks, layers)
        return torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)


def make_job(
    lengths: list[int],
    compacted: list[tuple[int, int] | paged_cases.Pruned | None],
    blocks: list[int],
    target: str = "own",
    idle: int = 0,
    seed: int = 0,
    as_bytes: bool = False,
    **case,
) -> Job:
    """Compact requests to `blocks[r]` blocks: "own", the last full ones of the request itself;
    "reversed", the same from the back; "fresh", blocks that it does not use yet.

    Random entries below the new tail stay; the last `idle` dealt sub-blocks stay unused. Whatever
    must not be looked at is garbage. Where layers share, later ones keep more, as a device needs it
    unless the target is "fresh".
    """
    made = paged_cases.make_case(lengths, compacted, seed=seed, spare_slots=4, **case)
    caches, rows, holdings = made.caches, made.rows, made.holdings
    random = torch.Generator().manual_seed(seed)
    layers, heads, size = caches.layers, caches.heads, caches.block_size
    requests, width = len(lengths), max(blocks) + 1
    full = torch.tensor(lengths, dtype=torch.int32) // size
    held = head_lengths(rows, holdings, size)
    counts = torch.zeros(layers, requests, heads, dtype=torch.int32)
    shared = holdings.shared
    columns = width * heads * size * (layers if shared else 1) + 3
    chosen = torch.full((layers, requests, columns), GARBAGE, dtype=torch.int32)
    kept_blocks = torch.full((requests, width), GARBAGE, dtype=torch.int32)
    for row, (length, count) in enumerate(zip(lengths, blocks, strict=True)):
        end = int(full[row])
        if target == "fresh":
            assert count <= 3
            start = -(-length // size)
            places = rows.blocks[row, start : start + count]
        else:
            places = rows.blocks[row, end - count : end]
        kept_blocks[row, :count] = places.flip(0) if target == "reversed" else places
        eligible = held[:, row] - (length - end * size)
        most = eligible // size
        if shared:
            each = count * heads
            dealt = split(each * layers - idle * (count > 0), most.flatten(), random)
            dealt = dealt.view(layers, heads).long()
            if target != "fresh":
                dealt = in_order(dealt, each, torch.zeros_like(dealt), most)
            counts[:, row] = dealt
        else:
            for layer in range(layers):
                total = count * heads - idle * (count > 0)
                counts[layer, row] = split(total, most[layer], random)
        for layer in range(layers):
            ranges = [torch.randperm(int(n), generator=random) for n in eligible[layer]]
            picked = [
                r[: int(c) * size].sort().values
                for r, c in zip(ranges, counts[layer, row], strict=True)
            ]
            every = torch.cat(picked).int()
            chosen[layer, row, : len(every)] = every
    shape = (layers, caches.tensors[0].shape[0], heads, size)
    positions = torch.randint(-(2**31), 2**31, shape, generator=random).int()
    tensors = [t.view(torch.uint8) if as_bytes else t for t in caches.tensors]
    on = lambda tensor: tensor.to(DEVICE)  # noqa: E731
    return Job(
        Caches.of([on(t) for t in tensors]),
        on(positions),
        Rows(on(rows.blocks), on(rows.lengths), on(rows.slots)),
        Holdings(on(holdings.counts), on(holdings.offsets), on(holdings.spans), shared),
        on(chosen),
        on(counts),
        on((counts.cumsum(2) - counts).int()),
        on(kept_blocks),
        on(torch.tensor(blocks, dtype=torch.int32)),
        on(full - torch.tensor(blocks, dtype=torch.int32)),
        on(full),
        on((counts.sum(2).cumsum(0) - counts.sum(2)).int()) if shared else None,
    )


def split(total: int, most: Tensor, random: torch.Generator) -> Tensor:
    """Random integers in 0..most, uneven, with this sum."""
    assert total <= int(most.sum())
    counts = torch.zeros_like(most)
    while total:
        head = int(torch.randint(len(most), (1,), generator=random))
        take = min(total, int(most[head] - counts[head]))
        take = int(torch.randint(take + 1, (1,), generator=random))
        counts[head] += take
        total -= take
    return counts.int()


def bits(job: Job) -> list[Tensor]:
    return [*(t.view(torch.uint8) for t in job.caches.tensors), job.positions]


def same(left: Job, right: Job) -> bool:
    return all(a.equal(b) for a, b in zip(bits(left), bits(right), strict=True))
