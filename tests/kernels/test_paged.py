"""Places of entries: hand-written tables, and the device functions against the reference."""

from __future__ import annotations

import paged_cases
import pytest
import torch
import triton
import triton.language as tl
from paged_cases import Pruned
from torch import Tensor

from uncomp.kernels.paged import (
    Caches,
    Holdings,
    Rows,
    gather,
    head_lengths,
    stored_sub_blocks,
    sub_blocks,
)
from uncomp.kernels.paged.kernel import (
    cache_offset,
    entry_offset,
    head_length,
    head_state,
    position_offset,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def ints(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def worked() -> tuple[Rows, Holdings]:
    """Blocks of 2 tokens, 3 heads, 1 layer. Request 0 is plain; request 1 was compacted.

    When request 1 had 4 full blocks, 2 of them (columns 2 and 3: blocks 5 and 9) were kept. Their
    sub-blocks, in order: (5,0) (5,1) (5,2) (9,0) (9,1) (9,2); head 0 got 4, head 1 none, head 2 2.
    """
    rows = Rows(ints([7, 2, 4, 0, 0, 0], [0, 0, 5, 9, 3, 8]), ints(5, 11), ints(-1, 1))
    holdings = Holdings.empty(1, 2, 3, "cpu")
    holdings.counts[0], holdings.counts[0, 1] = 99, ints(4, 0, 2)  # slot 0 is another request's
    holdings.offsets[0], holdings.offsets[0, 1] = 99, ints(0, 4, 4)
    holdings.spans[0], holdings.spans[1] = ints(99, 99), ints(2, 4)
    return rows, holdings


def places(rows: Rows, holdings: Holdings, row: int, layer: int, head: int, n: int):
    """Blocks and head slots; all in the layer's own cache."""
    found = sub_blocks(rows, holdings, row, layer, head, n)
    assert found[:, 0].eq(layer).all()
    return found[:, 1:].tolist()


def test_lengths_by_hand():
    rows, holdings = worked()
    # Request 1: kept sub-blocks of 2, and 11 - 4 * 2 tokens of the tail.
    assert head_lengths(rows, holdings, 2).tolist() == [[[5, 5, 5], [11, 3, 7]]]


def test_sub_blocks_by_hand():
    rows, holdings = worked()
    assert places(rows, holdings, 0, 0, 1, 3) == [[7, 1], [2, 1], [4, 1]]
    dealt = [[5, 0], [5, 1], [5, 2], [9, 0]]
    assert places(rows, holdings, 1, 0, 0, 6) == [*dealt, [3, 0], [8, 0]]
    assert places(rows, holdings, 1, 0, 1, 2) == [[3, 1], [8, 1]]
    assert places(rows, holdings, 1, 0, 2, 3) == [[9, 1], [9, 2], [3, 2]]
    assert sub_blocks(rows, holdings, 1, 0, 2, 0).shape == (0, 3)


def test_sub_blocks_of_layers_that_share_by_hand():
    """The request above with a second layer: of 12 sub-blocks layer 0 keeps 3 and layer 1 nine."""
    rows, _ = worked()
    holdings = Holdings.empty(2, 2, 3, "cpu", shared=True)
    holdings.counts[0, 1], holdings.counts[1, 1] = ints(2, 0, 1), ints(5, 4, 0)
    holdings.offsets[0, 1], holdings.offsets[1, 1] = ints(0, 2, 2), ints(3, 8, 12)
    holdings.spans[1] = ints(2, 4)
    assert sub_blocks(rows, holdings, 1, 0, 0, 3).tolist() == [[0, 5, 0], [0, 5, 1], [0, 3, 0]]
    assert sub_blocks(rows, holdings, 1, 0, 2, 2).tolist() == [[0, 5, 2], [0, 3, 2]]
    # Numbers 3 to 5 are the second block of layer 0, 6 is the first of layer 1.
    first = [[0, 9, 0], [0, 9, 1], [0, 9, 2], [1, 5, 0], [1, 5, 1]]
    second = [[1, 5, 2], [1, 9, 0], [1, 9, 1], [1, 9, 2]]
    for table in (holdings, holdings.part(1, 2)):
        layer = 1 - table.start
        assert sub_blocks(rows, table, 1, layer, 0, 6).tolist() == [*first, [1, 3, 0]]
        assert sub_blocks(rows, table, 1, layer, 1, 4).tolist() == second
    assert stored_sub_blocks(rows, holdings, 1, 1).tolist() == [5, 4, 0]


def test_a_pruned_prompt_by_hand():
    """Three full blocks and a token; layer 1 lacks the first block. Then two more tokens."""
    rows = Rows(ints([7, 2, 4, 5, 0]), ints(9), ints(0))
    holdings = Holdings.empty(2, 1, 3, "cpu")
    holdings.counts[1], holdings.spans[0] = -1, ints(3, 0)
    assert head_lengths(rows, holdings, 2).tolist() == [[[9, 9, 9]], [[7, 7, 7]]]
    assert places(rows, holdings, 0, 0, 2, 2) == [[7, 2], [2, 2]]
    assert places(rows, holdings, 0, 1, 2, 4) == [[2, 2], [4, 2], [5, 2], [0, 2]]
    assert stored_sub_blocks(rows, holdings, 0, 0).tolist() == [3, 3, 3]
    assert stored_sub_blocks(rows, holdings, 0, 1).tolist() == [2, 2, 2]


def test_stored_positions_are_those_of_kept_entries():
    rows, holdings = worked()
    assert stored_sub_blocks(rows, holdings, 0, 0).tolist() == [0, 0, 0]
    assert stored_sub_blocks(rows, holdings, 1, 0).tolist() == [4, 0, 2]


def test_gather_by_hand():
    """Every token holds [block, head, place, -1]: two numbers of K, two of V."""
    rows, holdings = worked()
    cache = torch.full((10, 3, 2, 4), -1.0)
    cache[..., 0] = torch.arange(10.0)[:, None, None]
    cache[..., 1] = torch.arange(3.0)[:, None]
    cache[..., 2] = torch.arange(2.0)
    caches = Caches.of([cache], torch.tensor([[2.0, 3.0]]))
    keys, values, lengths = gather(caches, rows, holdings, 1, 0)
    assert lengths.tolist() == [11, 3, 7]
    expected = [[9, 1], [9, 1], [9, 2], [9, 2], [3, 2], [3, 2], [8, 2]]
    assert keys[2].div(2).tolist() == expected + [[0, 0]] * 4
    assert values[2].div(3).tolist() == [[0, -1], [1, -1]] * 3 + [[0, -1]] + [[0, 0]] * 4
    assert keys[1].div(2).tolist() == [[3, 1], [3, 1], [8, 1]] + [[0, 0]] * 8


def test_gather_of_a_plain_request_is_its_tokens_in_order():
    case = paged_cases.make_case([37], [None], layout="NHD", head_size=16)
    keys, values, lengths = gather(case.caches, case.rows, case.holdings, 0, 1)
    tokens = case.caches.tensors[1][case.rows.blocks[0].long()].transpose(1, 2).flatten(0, 1)[:37]
    assert keys.equal(tokens[..., :16].transpose(0, 1))
    assert values.equal(tokens[..., 16:].transpose(0, 1))
    assert lengths.tolist() == [37] * 3


def test_parts_are_the_layers():
    case = paged_cases.make_case([40, 33], [(1, 2), None], layers=3, dtype=torch.float8_e4m3fn)
    caches, holdings = case.caches.part(1, 3), case.holdings.part(1, 3)
    assert (caches.layers, holdings.counts.shape[0], holdings.slots) == (2, 2, case.holdings.slots)
    assert caches.pointers.tolist() == [t.data_ptr() for t in case.caches.tensors[1:]]
    for layer in range(2):
        for row in range(2):
            whole = gather(case.caches, case.rows, case.holdings, row, layer + 1)
            for a, b in zip(gather(caches, case.rows, holdings, row, layer), whole, strict=True):
                assert a.equal(b)


def test_caches_describe_their_tensors():
    tensors = [torch.zeros(4, 16, 3, 20, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2)]
    caches = Caches.of(tensors)
    assert (caches.layers, caches.heads, caches.block_size, caches.head_size) == (2, 3, 16, 10)
    assert caches.strides == (960, 20, 60)
    assert caches.dtype == torch.bfloat16
    assert caches.pointers.dtype == torch.int64
    assert caches.scales.tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "at least one layer"),
        ([torch.zeros(2, 3, 4)], r"num_blocks, H, block_size, 2 \* d.*\[2, 3, 4\]"),
        ([torch.zeros(2, 3, 4, 5)], r"got \[2, 3, 4, 5\]"),
        ([torch.zeros(2, 3, 8, 4).transpose(2, 3)], "last stride 1"),
        ([torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, 8).half()], "layer 1 is .*float16"),
        ([torch.zeros(2, 3, 4, 8), torch.zeros(3, 3, 4, 8)], r"layer 1 is \[3, 3, 4, 8\]"),
        (
            [torch.zeros(2, 3, 4, 8), torch.zeros(2, 4, 3, 8).transpose(1, 2)],
            r"layer 1 is .*\(96, 8, 24, 1\)",
        ),
    ],
)
def test_caches_that_do_not_fit(tensors, message):
    with pytest.raises(ValueError, match=message):
        Caches.of(tensors)


# --- device functions --------------------------------------------------------------------------


@triton.jit
def read_kernel(
    pointers_ptr,
    blocks_ptr,
    lengths_ptr,
    slots_ptr,
    counts_ptr,
    offsets_ptr,
    spans_ptr,
    positions_ptr,
    out_ptr,
    places_ptr,
    held_ptr,
    num_slots,
    num_blocks,
    row_stride,
    stride_block,
    stride_head,
    stride_token,
    entries,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Grid (R, L, H). `out` [L, R, H, entries, SIZE], `places` the same without SIZE, `held` [L, R,
    H] int32."""
    row, layer, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    line = (layer * tl.num_programs(0) + row) * HEADS + head
    count, offset, first, full = head_state(
        counts_ptr,
        offsets_ptr,
        spans_ptr,
        layer,
        tl.load(slots_ptr + row),
        head,
        num_slots,
        HEADS,
    )
    held = head_length(tl.load(lengths_ptr + row), count, full, BLOCK_SIZE)
    tl.store(held_ptr + line, held)
    entry = tl.arange(0, TILE)
    mask = entry < held
    own = tl.load(pointers_ptr + layer)
    at = cache_offset(
        pointers_ptr,
        own,
        layer,
        blocks_ptr + row * row_stride,
        entry,
        mask,
        count,
        offset,
        first,
        full,
        head,
        stride_block,
        stride_head,
        stride_token,
        HEADS,
        BLOCK_SIZE,
        4,
        SHARED,
    )
    # As of a table whose first layer is number 1 of all.
    of_layer = positions_ptr + num_blocks * HEADS * BLOCK_SIZE
    place = position_offset(
        1,
        layer - 1,
        num_blocks,
        blocks_ptr + row * row_stride,
        entry,
        mask,
        count,
        offset,
        first,
        full,
        head,
        HEADS,
        BLOCK_SIZE,
        SHARED,
    )
    found = tl.load(of_layer + place, mask=mask, other=0)
    tl.store(places_ptr + line * entries + entry, found, mask=entry < entries)
    cache = own.to(tl.pointer_type(tl.float32))
    element = tl.arange(0, SIZE)
    values = tl.load(cache + at[:, None] + element[None, :], mask=mask[:, None], other=0.0)
    target = out_ptr + (line * entries + entry[:, None]) * SIZE + element[None, :]
    tl.store(target, values, mask=(entry < entries)[:, None])


CASES = {
    "plain": ([33, 0, 1, 16], [None] * 4, {}),
    "compacted": ([90, 48, 70], [(2, 3), (3, 3), (1, 4)], {}),
    "nothing kept": ([40, 32], [(0, 2), (0, 2)], {}),
    "mixed": ([64, 85, 17], [None, (2, 4), None], {}),
    "pruned": ([64, 85, 80], [Pruned(4, (0, 1)), (2, 4), Pruned(4, (2, 3))], {}),
    "odd": ([29, 50, 24], [(2, 3), None, (3, 3)], {"heads": 7, "block_size": 8, "layers": 3}),
    "one head": ([50, 64], [(1, 3), None], {"heads": 1, "layers": 1}),
    "shared": ([64, 85, 70], [None, (2, 4), (1, 4)], {"layers": 4, "shared": True}),
    "shared odd": ([29, 50], [(2, 3), (3, 3)], {"heads": 5, "block_size": 8, "shared": True}),
}


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("name", CASES)
def test_device_functions_find_what_the_reference_finds(name, layout):
    lengths, compacted, options = CASES[name]
    case = paged_cases.make_case(lengths, compacted, head_size=4, layout=layout, **options)
    heads, size = case.caches.heads, case.caches.block_size
    caches = Caches.of([t.to(DEVICE) for t in case.caches.tensors])
    tables = [
        t.to(DEVICE)
        for t in (
            *(case.rows.blocks, case.rows.lengths, case.rows.slots),
            *(case.holdings.counts, case.holdings.offsets, case.holdings.spans),
        )
    ]
    tile = 128
    held = torch.full((caches.layers, len(lengths), heads), -1, dtype=torch.int32, device=DEVICE)
    out = torch.full((*held.shape, tile, 8), float("nan"), device=DEVICE)
    found_places = torch.zeros((*held.shape, tile), dtype=torch.int32, device=DEVICE)
    shape = (caches.layers, caches.tensors[0].shape[0], heads, size)
    positions = torch.randint(2**31 - 1, shape, dtype=torch.int32)
    read_kernel[(len(lengths), caches.layers, heads)](
        caches.pointers,
        *tables,
        positions.to(DEVICE),
        out,
        found_places,
        held,
        case.holdings.slots,
        shape[1],
        case.rows.blocks.stride(0),
        *caches.strides,
        tile,
        HEADS=heads,
        BLOCK_SIZE=size,
        SIZE=8,
        TILE=tile,
        SHARED=case.holdings.shared,
    )
    assert held.cpu().long().equal(head_lengths(case.rows, case.holdings, size))
    for layer in range(caches.layers):
        for row in range(len(lengths)):
            keys, values, _ = gather(case.caches, case.rows, case.holdings, row, layer)
            found = out[layer, row].cpu()
            assert found[:, : keys.shape[1]].equal(torch.cat([keys, values], -1))
            assert found[:, keys.shape[1] :].eq(0).all()
            for head, length in enumerate(held[layer, row].tolist()):
                at = sub_blocks(case.rows, case.holdings, row, layer, head, -(-length // size))
                there = positions[at.unbind(1)].flatten()[:length]
                assert found_places[layer, row, head, :length].cpu().equal(there)


@triton.jit
def far_kernel(blocks_ptr, out_ptr, stride_block, HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    entry = tl.arange(0, 4)
    at = entry_offset(
        blocks_ptr, entry, entry < 3, 0, 0, 0, 0, 1, stride_block, 64, 8, HEADS, BLOCK_SIZE
    )
    tl.store(out_ptr + entry, at)


def test_offsets_beyond_32_bits():
    blocks = ints(3, 2**20).to(DEVICE)
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    far_kernel[(1,)](blocks, out, 2**15, HEADS=2, BLOCK_SIZE=2)
    # The last entry is masked: block 0.
    assert out.tolist() == [3 * 2**15 + 64, 3 * 2**15 + 72, 2**35 + 64, 72]
