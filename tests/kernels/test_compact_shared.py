"""Compaction where all layers share one budget: survivors move into other layers' caches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compact_cases import DEVICE, Job, make_job, same

from uncomp.kernels.compact import compact as naive
from uncomp.kernels.compact.launch import compact, scratch_bytes
from uncomp.kernels.paged import Holdings, gather

SHARED = {"layers": 4, "shared": True}
FIRST = {"lengths": [70, 64, 40], "compacted": [None] * 3, "blocks": [2, 1, 0], **SHARED}
#: later compactions write to blocks that hold nothing
LATER = {
    **{"lengths": [90, 64, 81], "compacted": [(2, 3), (1, 4), None], "blocks": [2, 1, 3]},
    **SHARED,
}


def moved(job: Job) -> Job:
    """The job with its requests as they are afterwards."""
    requests, layers = job.counts.shape[1], job.caches.layers
    holdings = Holdings.empty(layers, requests, job.caches.heads, DEVICE, shared=True)
    holdings.counts.copy_(job.counts)
    holdings.offsets.copy_(job.offsets + job.begins.unsqueeze(2))
    holdings.spans.copy_(torch.stack([job.first, job.full], 1))
    blocks = job.rows.blocks.clone()
    for row, count in enumerate(job.kept_count.tolist()):
        first = int(job.first[row])
        blocks[row, first : first + count] = job.kept_blocks[row, :count]
    slots = torch.arange(requests, dtype=torch.int32, device=DEVICE)
    return replace(job, rows=replace(job.rows, blocks=blocks, slots=slots), holdings=holdings)


def check(job: Job, **options) -> None:
    """Bit for bit as the reference, and every head finds what was chosen for it and its tail."""
    expected, before = job.copy(), job.copy()
    naive(*expected.arguments, **expected.options)
    compact(*job.arguments, job.scratch(), **job.options, **options)
    assert same(job, expected)
    assert not same(job, before)
    after, size = moved(job), job.caches.block_size
    for layer in range(4):
        for row in range(len(job.rows.lengths)):
            old, _, held = gather(before.caches, before.rows, before.holdings, row, layer)
            new, _, _ = gather(after.caches, after.rows, after.holdings, row, layer)
            tail = int(job.rows.lengths[row]) - int(job.full[row]) * size
            for head in range(job.caches.heads):
                start = int(job.offsets[layer, row, head]) * size
                count = int(job.counts[layer, row, head]) * size
                chosen = job.chosen[layer, row, start : start + count].long().cpu()
                rest = old[head, int(held[head]) - tail : int(held[head])]
                want = torch.cat([old[head, chosen], rest])
                assert new[head, : len(want)].equal(want), (layer, row, head)


@pytest.mark.parametrize("target", ["own", "reversed", "fresh"])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_a_first_compaction(target, layout):
    job = make_job(**FIRST, target=target, layout=layout)
    most = job.kept_count.long() * job.caches.heads
    assert (job.counts.sum(2) > most).any(), "no layer keeps more than it has"
    check(job)


@pytest.mark.parametrize("seed", range(3))
def test_later_compactions(seed):
    check(make_job(**LATER, target="fresh", seed=seed, idle=seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=["bf16", "fp8"])
def test_dtypes(dtype):
    as_bytes = dtype == torch.uint8
    job = make_job(**FIRST, dtype=torch.float8_e4m3fn if as_bytes else dtype, as_bytes=as_bytes)
    expected = job.copy()
    naive(*expected.arguments, **expected.options)
    compact(*job.arguments, job.scratch(), **job.options)
    assert same(job, expected)


@pytest.mark.parametrize("seed", range(2))
def test_layer_after_layer(seed):
    """With scratch for one layer, and as parts: what is written was read before."""
    job = make_job(**FIRST, seed=seed)
    expected, alone = job.copy(), job.copy()
    naive(*expected.arguments, **expected.options)
    lines = 3 * job.chosen.shape[2]
    one = job.scratch()[: lines * (2 * 64 + 1) * 4]
    compact(*job.arguments, one, **job.options)
    assert same(job, expected)
    for i in range(4):
        part = slice(i, i + 1)
        compact(
            alone.caches.part(i, i + 1), alone.positions[part], alone.rows,
            alone.holdings.part(i, i + 1), alone.chosen[part], alone.counts[part],
            alone.offsets[part], alone.kept_blocks, alone.kept_count, one,
            begins=alone.begins[part],
        )  # fmt: skip
    assert same(alone, expected)


def test_wrong_counts_stay_inside_the_dealt_sub_blocks():
    job = make_job(**FIRST, target="fresh")
    expected = job.copy()
    expected.counts = expected.counts.clone()
    expected.counts[3, 0] = torch.tensor([0, 0, 0], dtype=torch.int32)
    expected.begins = expected.begins.clone()
    naive(*expected.arguments, **expected.options)
    job.begins = job.begins.clone()
    job.begins[3, 0] = 4 * 2 * 3  # all that the blocks of request 0 have
    compact(*job.arguments, job.scratch(), **job.options)
    assert same(job, expected)


def test_what_is_refused():
    job = make_job(**FIRST)
    with pytest.raises(ValueError, match=r"need begins, int32 \[4, 3\], got None"):
        compact(*job.arguments, job.scratch())
    with pytest.raises(ValueError, match="moved together"):
        naive(*job.arguments)
    assert scratch_bytes(job.caches, 3, 3, 2) == 2 * scratch_bytes(job.caches, 3, 3)
