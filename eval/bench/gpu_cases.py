"""Paged caches with compacted and plain requests on a device, at real and at toy sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uncomp.kernels.paged import Caches, Holdings, Rows, sub_blocks

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Shape:
    """Attention of a model: KV heads, query heads of each, head size; and the cache's block."""

    layers: int
    heads: int
    group: int
    size: int
    block: int = 16

    def __str__(self) -> str:
        return f"{self.heads * self.group} query heads, {self.heads} KV heads, d {self.size}"

    def entry_bytes(self, dtype: torch.dtype) -> int:
        """K and V of one token and KV head."""
        return 2 * self.size * dtype.itemsize


#: Llama-3.1-8B
LLAMA = Shape(32, 8, 4, 128)
#: what Triton's interpreter gets through in seconds
TOY = Shape(2, 2, 2, 16)


@dataclass
class Case:
    """Requests in a cache.

    Attributes:
        positions: `[L, num_blocks, H, block]` int32, of kept entries.
    """

    shape: Shape
    caches: Caches
    rows: Rows
    holdings: Holdings
    positions: Tensor

    @property
    def device(self) -> torch.device:
        return self.caches.device

    def queries(self, tokens: int, seed: int = 1) -> Tensor:
        """`[tokens, query heads, d]` of the caches' dtype (bf16 for FP8 caches)."""
        random = torch.Generator(self.device).manual_seed(seed)
        shape = (tokens, self.shape.heads * self.shape.group, self.shape.size)
        drawn = torch.randn(shape, generator=random, device=self.device)
        return drawn.to(torch.bfloat16 if self.caches.dtype.itemsize == 1 else self.caches.dtype)

    def clone(self) -> Case:
        """The same with caches and positions of its own."""
        tensors = [_copy(tensor) for tensor in self.caches.tensors]
        caches = Caches.of(tensors, self.caches.scales)
        return Case(self.shape, caches, self.rows, self.holdings, self.positions.clone())


def checked_case(
    shape: Shape,
    lengths: list[int],
    compacted: list[tuple[int, int] | None],
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
    seed: int = 0,
    shared: bool = False,
) -> Case:
    """A case whose unused memory is NaN, heads of compacted requests hold unequal numbers.

    Args:
        compacted: (kept, full) blocks of a request at its compaction, or None.
        shared: whether all layers share one budget.
    """
    case = _empty_case(shape, lengths, dtype, layout, device, seed, float("nan"), shared=shared)
    random = torch.Generator().manual_seed(seed)
    _compact_rows(case, compacted, random)
    for row, length in enumerate(lengths):
        slot = int(case.rows.slots[row])
        for layer in range(shape.layers):
            for head in range(shape.heads):
                _fill_head(case, row, slot, layer, head, length, random)
    return case


def timed_case(
    shape: Shape,
    lengths: list[int],
    compacted: list[tuple[int, int] | None],
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
    seed: int = 0,
    shared: bool = False,
) -> Case:
    """A case with random numbers everywhere; compacted requests own kept blocks and tail only."""
    case = _empty_case(shape, lengths, dtype, layout, device, seed, None, compacted, shared)
    _compact_rows(case, compacted, torch.Generator().manual_seed(seed))
    return case


def new_cache(
    shape: Shape, blocks: int, dtype: torch.dtype, layout: str, device: torch.device
) -> Tensor:
    """`[blocks, H, block, 2 d]` uninitialised; NHD: tokens before heads in memory (vLLM's)."""
    if layout == "HND":
        size = (blocks, shape.heads, shape.block, 2 * shape.size)
        return torch.empty(size, dtype=dtype, device=device)
    size = (blocks, shape.block, shape.heads, 2 * shape.size)
    return torch.empty(size, dtype=dtype, device=device).transpose(1, 2)


def fill_normal(tensor: Tensor, seed: int = 0) -> None:
    """Random numbers without a copy of the whole in another type."""
    random = torch.Generator(tensor.device).manual_seed(seed)
    step = max(1, (256 << 20) // (tensor[0].numel() * 4))
    for start in range(0, tensor.shape[0], step):
        part = tensor[start : start + step]
        drawn = torch.randn(part.shape, generator=random, device=part.device, dtype=torch.float32)
        part.copy_(drawn)


def _empty_case(
    shape: Shape,
    lengths: list[int],
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
    seed: int,
    fill: float | None,
    compacted: list[tuple[int, int] | None] | None = None,
    shared: bool = False,
) -> Case:
    """Blocks in random order; `fill` None: normal numbers."""
    width = max(-(-n // shape.block) for n in lengths) + 1
    blocks = torch.zeros(len(lengths), width, dtype=torch.int32)
    owned = []
    for row, length in enumerate(lengths):
        compaction = compacted[row] if compacted else None
        first = compaction[1] - compaction[0] if compaction else 0
        owned.append((row, first, -(-length // shape.block)))
    total = sum(last - first for _, first, last in owned)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)) + 1
    for row, first, last in owned:
        blocks[row, first:last] = order[: last - first].to(torch.int32)
        order = order[last - first :]
    tensors = []
    for layer in range(shape.layers):
        cache = new_cache(shape, total + 1, dtype, layout, device)
        if fill is None:
            fill_normal(cache, layer)
        else:
            cache.fill_(fill)
        tensors.append(cache)
    scales = None
    if dtype.itemsize == 1:
        drawn = torch.rand(shape.layers, 2, generator=torch.Generator().manual_seed(seed))
        scales = (drawn + 0.5).to(device)
    slots = torch.full((len(lengths),), -1, dtype=torch.int32)
    rows = Rows(
        blocks.to(device), torch.tensor(lengths, dtype=torch.int32).to(device), slots.to(device)
    )
    holdings = Holdings.empty(shape.layers, len(lengths) + 2, shape.heads, device, shared)
    positions = torch.zeros(
        shape.layers, total + 1, shape.heads, shape.block, dtype=torch.int32, device=device
    )
    return Case(shape, Caches.of(tensors, scales), rows, holdings, positions)


def _compact_rows(
    case: Case, compacted: list[tuple[int, int] | None], random: torch.Generator
) -> None:
    """Deal the kept sub-blocks of compacted requests; slots are not in the order of the rows."""
    shape, holdings = case.shape, case.holdings
    counts = torch.zeros(holdings.counts.shape, dtype=torch.int32)
    spans, slots = torch.zeros(holdings.spans.shape, dtype=torch.int32), case.rows.slots.cpu()
    free = torch.randperm(holdings.slots, generator=random).tolist()
    for row, compaction in enumerate(compacted):
        if compaction is None:
            continue
        kept, full = compaction
        slots[row] = slot = free.pop()
        spans[slot] = torch.tensor([full - kept, full])
        if holdings.shared:
            heads = shape.layers * shape.heads
            counts[:, slot] = _split(kept * heads, heads, full, random).view(shape.layers, -1)
            continue
        for layer in range(shape.layers):
            counts[layer, slot] = _split(kept * shape.heads, shape.heads, full, random)
    offsets = counts.cumsum(2) - counts
    if holdings.shared:  # numbered through all layers
        offsets += (counts.sum(2).cumsum(0) - counts.sum(2)).unsqueeze(2)
    holdings.counts.copy_(counts)
    holdings.offsets.copy_(offsets)
    holdings.spans.copy_(spans)
    case.rows.slots.copy_(slots)


def _split(total: int, heads: int, most: int, random: torch.Generator) -> Tensor:
    """Integers in 0..most with this sum, unequal."""
    weights = torch.rand(heads, generator=random) + 0.5
    counts = (weights / weights.sum() * total).int().clamp_max(most)
    for head in range(heads):
        spare = min(total - int(counts.sum()), most - int(counts[head]))
        counts[head] += spare
    return counts


def _fill_head(
    case: Case, row: int, slot: int, layer: int, head: int, length: int, random: torch.Generator
) -> None:
    shape, cache = case.shape, case.caches.tensors[layer]
    count = int(case.holdings.counts[layer, slot, head]) if slot >= 0 else 0
    full = int(case.holdings.spans[slot, 1]) if slot >= 0 else 0
    held = length + (count - full) * shape.block
    n = -(-held // shape.block)
    if n == 0:
        return
    at = sub_blocks(case.rows, case.holdings, row, layer, head, n)
    values = torch.randn(n * shape.block, 2 * shape.size, generator=random)
    values[held:] = float("nan")
    values = values.view(n, shape.block, -1).to(cache.device)
    values = _bytes(values.to(cache.dtype))  # index assignment is not there for FP8
    for other in at[:, 0].unique().tolist():
        here = at[:, 0] == other
        _bytes(case.caches.tensors[other])[at[here, 1], at[here, 2]] = values[here]
    if count:
        drawn = torch.randperm(full * shape.block, generator=random)[: count * shape.block]
        places = drawn.sort().values.to(torch.int32).view(count, shape.block)
        case.positions[at[:count].unbind(1)] = places.to(cache.device)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.preserve_format).copy_(tensor)
