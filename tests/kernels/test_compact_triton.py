"""Compaction: worked by hand, against an independent reading of the cache, and Triton's bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compact_cases import DEVICE, GARBAGE, Job, bits, make_job, same, split
from paged_cases import Pruned
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from uncomp.kernels.compact import compact as naive
from uncomp.kernels.compact import launch, record
from uncomp.kernels.compact.launch import CONFIGS, choose, compact, scratch_bytes
from uncomp.kernels.paged import Caches, Holdings, Rows, gather, head_lengths


def check(job: Job, scratch: Tensor | None = None, **options) -> None:
    """Triton's result is the reference's, bit for bit, in every block and position."""
    before, expected = job.copy(), job.copy()
    naive(*expected.arguments)
    compact(*job.arguments, job.scratch() if scratch is None else scratch, **options)
    assert same(job, expected)
    assert not same(job, before)


# --- the reference -----------------------------------------------------------------------------


def test_by_hand():
    """Two heads, blocks of two tokens, five tokens: entry e of head h is the number 10 h + e."""
    cache = torch.full((5, 2, 2, 16), -1.0)
    blocks = torch.tensor([[3, 1, 4]], dtype=torch.int32)
    for entry in range(5):
        for head in range(2):
            cache[blocks[0, entry // 2], head, entry % 2] = 10 * head + entry
    rows = Rows(blocks, torch.tensor([5], dtype=torch.int32), torch.tensor([-1], dtype=torch.int32))
    holdings = Holdings.empty(1, 1, 2, "cpu")
    positions = torch.full((1, 5, 2, 2), -7, dtype=torch.int32)
    # Head 0 keeps nothing, head 1 two sub-blocks: all of block 1, which was the second of the row.
    counts = torch.tensor([[[0, 2]]], dtype=torch.int32)
    offsets = torch.tensor([[[0, 0]]], dtype=torch.int32)
    naive(
        Caches.of([cache]),
        positions,
        rows,
        holdings,
        torch.tensor([[[0, 1, 2, 3]]], dtype=torch.int32),
        counts,
        offsets,
        torch.tensor([[1]], dtype=torch.int32),
        torch.tensor([1], dtype=torch.int32),
    )
    assert cache[1, :, :, 0].tolist() == [[10, 11], [12, 13]]
    assert positions[0, 1].tolist() == [[0, 1], [2, 3]]
    assert cache[3, :, :, 0].tolist() == [[0, 1], [10, 11]]  # not a destination
    assert cache[4, :, :, 0].tolist() == [[4, -1], [14, -1]]
    assert positions[0, [0, 2, 3, 4]].eq(-7).all()

    one = torch.zeros(1, dtype=torch.int32)
    record(holdings, one, counts, offsets, torch.tensor([1]).int(), torch.tensor([2]).int())
    held = Rows(blocks, torch.tensor([6], dtype=torch.int32), one)
    cache[4, :, 1] = torch.tensor([5.0, 15.0])[:, None]
    # Now head 0 takes both sub-blocks of block 4 (its own tail and the place of head 1's).
    naive(
        Caches.of([cache]),
        positions,
        held,
        holdings,
        torch.tensor([[[0, 1, 1, 4]]], dtype=torch.int32),
        torch.tensor([[[1, 1]]], dtype=torch.int32),
        torch.tensor([[[0, 1]]], dtype=torch.int32),
        torch.tensor([[4]], dtype=torch.int32),
        torch.tensor([1], dtype=torch.int32),
    )
    assert cache[4, :, :, 0].tolist() == [[4, 5], [11, 14]]
    assert positions[0, 4].tolist() == [[4, 5], [1, 4]]


CASES = {
    "first": dict(lengths=[70, 33, 64], compacted=[None, None, None], blocks=[2, 1, 3]),
    "second": dict(lengths=[90, 64, 81], compacted=[(2, 3), (1, 4), (3, 3)], blocks=[2, 1, 3]),
    "pruned": dict(lengths=[90, 64], compacted=[Pruned(5, (0, 2)), (1, 4)], blocks=[3, 1]),
    "mixed": dict(lengths=[85, 40, 7], compacted=[(2, 4), None, None], blocks=[3, 2, 0]),
}
TARGETS = ["own", "reversed", "fresh"]


def location(job: Job, layer: int, row: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and positions of one head, read entry by entry."""
    keys, values, lengths = gather(job.caches, job.rows, job.holdings, row, layer)
    held, slot = int(lengths[head]), int(job.rows.slots[row])
    count = int(job.holdings.counts[layer, slot, head]) if slot >= 0 else 0
    offset = int(job.holdings.offsets[layer, slot, head]) if slot >= 0 else 0
    first, full = job.holdings.spans[slot].tolist() if slot >= 0 else (0, 0)
    places = []
    for entry in range(held):
        index, token = divmod(entry, job.caches.block_size)
        column, inside = full + index - count, head
        if index < count:
            column, inside = divmod(offset + index, job.caches.heads)
            column += first
        elif column >= first:  # neither dealt nor of a pruned prompt
            places.append(int(job.rows.lengths[row]) - (held - entry))
            continue
        block = int(job.rows.blocks[row, column])
        places.append(int(job.positions[layer, block, inside, token]))
    return keys[head, :held], values[head, :held], torch.tensor(places)


@pytest.mark.parametrize("name", CASES)
def test_reference_and_record_keep_what_was_chosen_and_the_tail(name):
    job = make_job(**CASES[name])
    layers, requests, heads = job.counts.shape
    every = [(i, r, h) for i in range(layers) for r in range(requests) for h in range(heads)]
    before = {key: location(job, *key) for key in every}
    naive(*job.arguments)
    slots = torch.randperm(job.holdings.slots)[:requests].int().to(DEVICE)
    record(job.holdings, slots, job.counts, job.offsets, job.first, job.full)
    job.rows = replace(job.rows, slots=slots)
    size = job.caches.block_size
    for layer, row, head in every:
        start, count = int(job.offsets[layer, row, head]), int(job.counts[layer, row, head])
        kept = job.chosen[layer, row, start * size : (start + count) * size].long().cpu()
        tail = int(job.rows.lengths[row]) - int(job.full[row]) * size
        after = location(job, layer, row, head)
        for old, new in zip(before[layer, row, head], after, strict=True):
            assert new.equal(torch.cat([old[kept], old[len(old) - tail :]]))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_only_dealt_sub_blocks_change(name, target):
    job = make_job(**CASES[name], target=target, idle=1)
    before = job.copy()
    compact(*job.arguments, job.scratch())
    for layer in range(job.caches.layers):
        untouched = torch.ones(job.positions.shape[1:3], dtype=torch.bool, device=DEVICE)
        for row, used in enumerate(job.counts[layer].sum(1).tolist()):
            for i in range(used):
                block = job.kept_blocks[row, i // job.caches.heads]
                untouched[block, i % job.caches.heads] = False
        old, new = (j.caches.tensors[layer].view(torch.uint8)[untouched] for j in (before, job))
        assert old.equal(new)
        assert before.positions[layer][untouched].equal(job.positions[layer][untouched])


# --- Triton ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_triton_moves_the_same_bits(name, target):
    check(make_job(**CASES[name], target=target))


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8],
    ids=str,
)
def test_dtypes_and_layouts(dtype, layout):
    as_bytes = dtype == torch.uint8
    dtype = torch.float8_e4m3fn if as_bytes else dtype
    check(make_job(**CASES["mixed"], dtype=dtype, layout=layout, as_bytes=as_bytes))


@pytest.mark.parametrize(
    "shape",
    [
        dict(heads=1, head_size=80, dtype=torch.bfloat16),
        dict(heads=5, head_size=96, dtype=torch.float8_e4m3fn),
        dict(heads=8, head_size=128, dtype=torch.bfloat16, layers=1),
        dict(heads=2, head_size=192, layers=1),
        dict(heads=3, head_size=256, layers=1, layout="NHD"),
        dict(heads=3, block_size=8, seed=3),
        dict(heads=3, block_size=32, seed=4),
        dict(heads=7, block_size=24, dtype=torch.float16, layers=1),
    ],
    ids=lambda s: "-".join(str(v) for v in s.values()),
)
def test_shapes(shape):
    size = shape.get("block_size", 16)
    lengths, compacted = [4 * size + 5, 5 * size, 1], [None, (2, 3), None]
    check(make_job(lengths, compacted, [1, 2, 0], **shape))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration(config):
    check(make_job(**CASES["second"], dtype=torch.bfloat16), config=config)


@pytest.mark.parametrize("layers", [1, 2, 3, 7])
def test_layers_are_grouped_by_the_scratch(layers):
    job = make_job([50, 37], [(1, 2), None], [2, 1], layers=5, heads=2, dtype=torch.bfloat16)
    scratch = job.scratch(layers)
    check(job, scratch[: scratch.numel() // 2 * 2].view(job.caches.dtype))


def test_scratch_one_byte_short_of_a_layer():
    job = make_job([50, 37], [(1, 2), None], [2, 1], layers=2, heads=2)
    before, need = job.copy(), scratch_bytes(job.caches, 2, 3)
    assert need == 2 * (3 * 2 * 16) * (2 * 64 * 4 + 4)
    with pytest.raises(ValueError, match=f"a scratch of {need} bytes .* got {need - 1}"):
        compact(*job.arguments, job.scratch(1)[:-1])
    assert same(job, before)


def test_two_compactions_one_after_the_other():
    """The second reads what the first wrote and recorded; tokens were decoded in between."""
    job = make_job(**CASES["first"], target="own")
    check(job)
    slots = torch.tensor([4, 0, 1], dtype=torch.int32, device=DEVICE)
    job.holdings = Holdings.empty(2, 5, 3, DEVICE)
    record(job.holdings, slots, job.counts, job.offsets, job.first, job.full)
    lengths = torch.tensor([88, 61, 70], dtype=torch.int32, device=DEVICE)
    rows = replace(job.rows, lengths=lengths, slots=slots)
    full = lengths // 16
    held = head_lengths(rows, job.holdings, 16) - (lengths - full * 16)[None, :, None]
    blocks, random = [2, 2, 1], torch.Generator().manual_seed(1)
    chosen, counts = torch.full_like(job.chosen, GARBAGE), torch.zeros_like(job.counts)
    for layer in range(2):
        for row, n in enumerate(blocks):
            counts[layer, row] = split(n * 3, held[layer, row] // 16, random)
            kept = [
                torch.randperm(int(most), generator=random)[: 16 * int(count)].sort().values
                for most, count in zip(held[layer, row], counts[layer, row], strict=True)
            ]
            chosen[layer, row, : n * 48] = torch.cat(kept).int()
            end = int(full[row])
            job.kept_blocks[row, :n] = rows.blocks[row, end - n : end]
    job.rows, job.chosen, job.counts = rows, chosen, counts
    job.offsets = (counts.cumsum(2) - counts).int()
    job.kept_count = torch.tensor(blocks, dtype=torch.int32, device=DEVICE)
    check(job)


@pytest.mark.parametrize("requests", [1, 2])
def test_rows_may_be_strided_and_alone(requests):
    job = make_job([70, 50][:requests], [None, (1, 2)][:requests], [2, 1][:requests])
    blocks, targets = job.rows.blocks, job.kept_blocks
    job.rows = replace(job.rows, blocks=widen(blocks, 40))
    job.kept_blocks = widen(targets, 7)
    check(job)


def widen(table: Tensor, width: int) -> Tensor:
    """The same table inside one with rows of this length."""
    wide = torch.full((len(table), width), GARBAGE, dtype=torch.int32, device=DEVICE)
    wide[:, : table.shape[1]] = table
    return wide[:, : table.shape[1]]


def test_scratch_that_no_entry_needs_is_not_written():
    job = make_job([70, 33], [None, None], [2, 1], head_size=80, dtype=torch.bfloat16)
    scratch = job.scratch()
    compact(*job.arguments, scratch)
    lines = job.kept_blocks.shape[1] * 3 * 16
    entries = scratch[: 2 * 2 * lines * 320].view(2, 2, lines, 320)
    places = scratch[2 * 2 * lines * 320 :].view(2, 2, lines, 4)
    for row, blocks in enumerate([2, 1]):
        assert entries[:, row, blocks * 48 :].eq(255).all()
        assert places[:, row, blocks * 48 :].eq(255).all()


def test_no_request_and_nothing_kept():
    job = make_job([40, 3], [None, None], [0, 0])
    before = job.copy()
    compact(*job.arguments, job.scratch())
    none = [job.chosen, job.counts, job.offsets]
    few = [t[:0] for t in (job.rows.blocks, job.rows.lengths, job.rows.slots)]
    empty = (*(t[:, :0].contiguous() for t in none), job.kept_blocks[:0], job.kept_count[:0])
    compact(job.caches, job.positions, Rows(*few), job.holdings, *empty, job.scratch()[:0])
    assert same(job, before)


def test_wrong_tables_write_nothing_outside_the_dealt_sub_blocks():
    """What the reference rejects must not become a wild address on the device."""
    job = make_job(**CASES["mixed"], target="fresh")
    expected = job.copy()
    naive(*expected.arguments)
    sane = job.copy()
    job.chosen = job.chosen.clone()
    job.chosen[0, 0, 0], job.chosen[1, 1, 5] = -1, 40  # the length of request 1
    with pytest.raises(ValueError, match=r"holds entries 0\.\."):
        naive(*job.copy().arguments)
    compact(*job.arguments, job.scratch())
    for layer, row, entry in ((0, 0, 0), (1, 1, 5)):
        block = job.kept_blocks[row, 0]
        expected.caches.tensors[layer][block, 0, entry] = 0
        expected.positions[layer, block, 0, entry] = 7
        job.positions[layer, block, 0, entry] = 7  # undefined
    assert same(job, expected)

    sane.kept_count = torch.tensor([2, 2, 0], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="request 0 keeps 9 sub-blocks in layer 0, but 2 blocks"):
        naive(*sane.copy().arguments)
    before = sane.copy()
    compact(*sane.arguments, sane.scratch())
    block = sane.kept_blocks[0, 2]  # the third
    for old, new in zip(bits(before)[:-1], bits(sane)[:-1], strict=True):
        assert old[block].equal(new[block])
    assert before.positions[:, block].equal(sane.positions[:, block])


# --- the launcher ------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Records what PyTorch is asked to do."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.name().removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


def test_launcher_neither_allocates_nor_waits(monkeypatch):
    job, grids = make_job(**CASES["mixed"], layers=5), []

    class Stub:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **options: None

    monkeypatch.setattr(launch, "gather_kernel", Stub())
    monkeypatch.setattr(launch, "scatter_kernel", Stub())
    scratch = job.scratch(2)
    with Operations() as operations:
        compact(*job.arguments, scratch)
    assert operations.seen <= {"view.dtype", "slice.Tensor", "detach"}
    tiles = -(-4 * 3 * 16 // choose(128).meta["ENTRIES"])
    assert grids == [(tiles, 3, n) for n in (2, 2, 2, 2, 1, 1)]


def test_record_writes_its_slots_only_and_does_not_wait():
    holdings = Holdings(
        *(torch.randint(9, (2, 6, 3), dtype=torch.int32) for _ in range(2)),
        torch.randint(9, (6, 2), dtype=torch.int32),
    )
    before = [t.clone() for t in (holdings.counts, holdings.offsets, holdings.spans)]
    slots = torch.tensor([4, 0], dtype=torch.int32)
    counts = torch.arange(12, dtype=torch.int32).view(2, 2, 3) + 100
    offsets, first, full = counts + 100, slots + 300, slots + 400
    with Operations() as operations:
        record(holdings, slots, counts, offsets, first, full)
    assert not operations.seen & {"_local_scalar_dense", "nonzero", "item"}
    expected = [t.clone() for t in before]
    for row, slot in enumerate([4, 0]):
        expected[0][:, slot], expected[1][:, slot] = counts[:, row], offsets[:, row]
        expected[2][slot] = torch.tensor([first[row], full[row]])
    for new, wanted in zip(
        (holdings.counts, holdings.offsets, holdings.spans), expected, strict=True
    ):
        assert new.equal(wanted)


def test_record_wrong_arguments():
    holdings = Holdings.empty(2, 4, 3, "cpu")
    one = torch.zeros(1, dtype=torch.int32)
    table = torch.zeros(2, 1, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"counts must be int32 \[2, 1, 3\], got .*int64"):
        record(holdings, one, table.long(), table, one, one)
    with pytest.raises(ValueError, match=r"full must be int32 \[1\], got torch.int32 \[2\]"):
        record(holdings, one, table, table, one, torch.zeros(2, dtype=torch.int32))


NAMES = ["positions", "chosen", "counts", "offsets", "kept_blocks", "kept_count"]


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_are_named(name):
    job = make_job(**CASES["mixed"])
    good = getattr(job, name)
    setattr(job, name, good.long())
    with pytest.raises(ValueError, match=rf"compact: {name} must be int32 .* got torch.int64"):
        compact(*job.arguments, job.scratch())
    setattr(job, name, good[..., None])
    with pytest.raises(ValueError, match=rf"compact: {name} must be int32 \["):
        compact(*job.arguments, job.scratch())
    setattr(job, name, torch.stack([good, good], -1)[..., 0])
    with pytest.raises(ValueError, match=rf"compact: {name} must be contiguous"):
        compact(*job.arguments, job.scratch())


def test_unaligned_cache_and_scratch():
    job = make_job(**CASES["mixed"])
    with pytest.raises(ValueError, match="scratch must be 1-D, contiguous and aligned"):
        compact(*job.arguments, job.scratch()[4:])
    tensors = [torch.empty(9, 3, 16, 12, dtype=torch.bfloat16) for _ in range(2)]
    job.caches = Caches.of([t.to(DEVICE) for t in tensors])
    job.positions = torch.zeros(2, 9, 3, 16, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"must be multiples of 16 bytes; .* head size 6"):
        compact(*job.arguments, job.scratch())
