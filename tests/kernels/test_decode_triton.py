"""Decode attention against the float64 reference: rows compressed and plain, cut anywhere.

The kernel's places depend on the plan, so the structure is tested in float32 with a tolerance that
one wrong entry out of hundreds exceeds; half precision and float8 are tested for rounding only.
"""

import pytest
import torch
from paged_cases import Case, Pruned, make_case
from torch import Tensor

from uncomp.kernels.decode import DecodeWorkspace, decode, decode_reference, plan
from uncomp.kernels.decode.launch import CONFIGS
from uncomp.kernels.paged import Caches, Holdings, Rows, head_lengths
from uncomp.kernels.variant import Config

FP8 = torch.float8_e4m3fn
MIXED = [70, 1, 33, 64, 16, 17]  # tokens; block size 16
COMPACTED = [(2, 3), None, (1, 2), Pruned(3, (0, 1, 2)), None, (0, 1)]


def space(case: Case, group: int, *, programs: int = 5, tokens: int = 1, **more) -> DecodeWorkspace:
    """A workspace, every buffer full of garbage."""
    rows = more.pop("rows", len(case.rows.lengths) + 1)
    workspace = DecodeWorkspace.empty(
        layers=case.caches.layers, rows=rows, heads=case.caches.heads, group=group,
        head_size=case.caches.head_size, programs=programs, device="cpu", query_tokens=tokens,
        **more,
    )  # fmt: skip
    poison(workspace)
    return workspace


def poison(workspace: DecodeWorkspace) -> None:
    for table in (workspace.starts, workspace.tasks, workspace.totals, workspace.bounds):
        table.fill_(-(2**30))
    workspace.acc.fill_(float("nan"))
    workspace.state.fill_(float("nan"))


def tolerance(dtype: torch.dtype, case: Case) -> float:
    """Weights and results are rounded to `dtype`, half an eps each, times the largest value.

    float32 has longer sums and exp2 instead: 1e-5 for values below 5.
    """
    if dtype == torch.float32:
        return 1e-5
    largest = max(t.float().nan_to_num(0.0).abs().max() for t in case.caches.tensors)
    if case.caches.dtype.itemsize == 1:
        largest = 5.0 * float(case.caches.scales.max())  # unused places hold 240
    return float(largest) * torch.finfo(dtype).eps


def check(
    case: Case,
    group: int,
    tokens: list[int],
    *,
    dtype: torch.dtype = torch.float32,
    layers: tuple[int, ...] = (0, 1),
    workspace: DecodeWorkspace | None = None,
    programs: int = 5,
    query: Tensor | None = None,
    truth: Case | None = None,
    **options,
) -> list[Tensor]:
    """Plan and attend; compare every token of a row, and find all others untouched."""
    heads, size = case.caches.heads * group, case.caches.head_size
    workspace = workspace or space(case, group, programs=programs, tokens=max(tokens))
    start = torch.tensor([0, *tokens]).cumsum(0).to(torch.int32)
    total = int(start[-1]) + 2  # tokens of no row at the end
    config = options.pop("config", None)
    plan(workspace, case.rows, start, case.holdings, case.caches.block_size)
    outs = []
    for layer in layers:
        if query is None:
            query = torch.randn(total, heads, size).to(dtype)
        out = torch.full((total, heads, size), float("nan"), dtype=dtype)
        same = decode(
            workspace, case.caches, layer, query, out, start, case.rows, case.holdings,
            size**-0.5, config=config, **options,
        )  # fmt: skip
        assert same is out
        rows = (truth or case).rows
        want = decode_reference(
            case.caches, layer, query, start, rows, case.holdings, size**-0.5, **options
        )
        for row, n in enumerate(tokens):
            if n > workspace.query_tokens:
                want[start[row] : start[row + 1]] = float("nan")
        torch.testing.assert_close(
            out.double(), want, atol=tolerance(dtype, case), rtol=1e-5, equal_nan=True
        )
        outs.append(out)
    return outs


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize(("heads", "shared"), [(1, 0), (2, 0), (3, 0), (8, 0), (1, 1), (3, 1)])
def test_mixed_rows(heads, layout, shared):
    case = make_case(MIXED, COMPACTED, heads=heads, layout=layout, layers=3, shared=bool(shared))
    check(case, 3, [1] * 6, layers=(0, 2) if heads < 8 else (2,))


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 16])
def test_groups(group):
    case = make_case([40, 70], [None, (1, 3)], heads=2)
    check(case, group, [1, 1], layers=(1,), programs=3)


@pytest.mark.parametrize("size", [16, 64, 80, 96, 128, 192, 256])
def test_head_sizes(size):
    case = make_case([70, 5], [(2, 3), None], heads=2, head_size=size)
    check(case, 3, [1, 2], layers=(1,), programs=4, workspace=space(case, 3, programs=4, tokens=2))


@pytest.mark.parametrize("block_size", [1, 8, 32, 48])
def test_block_sizes(block_size):
    lengths = [2 * block_size + 1, 3 * block_size]
    case = make_case(lengths, [(1, 2), None], heads=3, block_size=block_size)
    check(case, 2, [1, 1], layers=(1,), programs=4)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129])
def test_lengths_around_blocks_and_chunks(length):
    case = make_case([length], [None], heads=1, layers=1)
    check(case, 2, [1], layers=(0,), programs=2)


@pytest.mark.parametrize("programs", [1, 2, 3, 7, 16, 40])
def test_every_cut_gives_the_same(programs):
    """From one program for all heads to more programs than there are units."""
    case = make_case([200, 64, 7], [(8, 11), None, None], heads=2, layers=1)
    check(case, 2, [1, 3, 2], layers=(0,), programs=programs)


@pytest.mark.parametrize("chunk", [16, 32, 128])
def test_chunks(chunk):
    case = make_case([150, 70], [(3, 7), None], heads=2, layers=1)
    config = Config({"BLOCK_N": min(chunk, 64)})
    workspace = space(case, 2, programs=7, chunk=chunk, tokens=2)
    check(case, 2, [1, 2], layers=(0,), workspace=workspace, config=config)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_configs(config):
    case = make_case([90, 40], [(2, 4), None], heads=2)
    check(case, 4, [1, 1], layers=(1,), programs=3, config=config)


@pytest.mark.parametrize("programs", [2, 9])
def test_several_tokens_are_causal(programs):
    case = make_case([67, 40, 4, 70], [(1, 4), None, None, (3, 4)], heads=2)
    check(case, 3, [4, 3, 4, 2], layers=(1,), programs=programs)


@pytest.mark.parametrize("size", [64, 256])
def test_eight_tokens_and_sixteen_heads(size):
    """256: more lines than a program takes."""
    case = make_case([80, 8], [(2, 4), None], heads=1, layers=1, head_size=size)
    check(case, 16, [8, 8], layers=(0,), programs=3)


def test_rows_without_tokens_write_nothing():
    """Rows between others, and padding at the end, whatever they hold."""
    case = make_case([70, 30, 50, 20, 9], [(2, 3), (1, 1), None, None, None], heads=3)
    lengths = case.rows.lengths.clone()
    slots = case.rows.slots.clone()
    blocks = case.rows.blocks.clone()
    for row in (1, 3):
        lengths[row], slots[row], blocks[row] = -(2**30), 2**30, 2**30
    broken = Case(case.caches, Rows(blocks, lengths, slots), case.holdings)
    check(broken, 2, [1, 0, 2, 0, 1], programs=4, truth=case)
    check(broken, 2, [0, 0, 1, 0, 0], programs=4, truth=case)


def test_nothing_to_do():
    case = make_case([20, 9], [(1, 1), None], heads=2)
    workspace = space(case, 2)
    check(case, 2, [0, 0], workspace=workspace)
    out = torch.zeros(0, 4, 64)
    none = Rows(case.rows.blocks[:0], case.rows.lengths[:0], case.rows.slots[:0])
    start = torch.zeros(1, dtype=torch.int32)
    plan(workspace, none, start, case.holdings, 16)
    decode(workspace, case.caches, 0, out, out, start, none, case.holdings, 1.0)


def test_rows_with_too_many_tokens_are_left_alone():
    case = make_case([70, 30, 50], [(2, 3), None, None], heads=2)
    check(case, 2, [2, 5, 1], layers=(0,), workspace=space(case, 2, tokens=2))


@pytest.mark.parametrize("sinks", [False, True])
def test_head_that_holds_nothing(sinks):
    """All kept sub-blocks went to other heads and no tail: zero, with sinks too."""
    case = make_case([32, 40], [(1, 2), None], heads=3, layers=1)
    slot = case.rows.slots[0]
    count = case.holdings.counts[:, slot]
    empty = (count == 0).nonzero()
    assert len(empty), "this seed must give a head nothing"
    extra = torch.randn(6) if sinks else None
    (out,) = check(case, 2, [1, 1], layers=(0,), sinks=extra)
    head = int(empty[0, 1])
    assert not out[0, 2 * head : 2 * head + 2].any()


@pytest.mark.parametrize("programs", [1, 2, 6, 50])
def test_one_long_head_beside_short_ones(programs):
    """900 tokens in one head, 1 in the others; the work is cut evenly."""
    case = make_case([897, 1, 1], [(14, 56), None, None], heads=4, layers=1)
    slot = case.rows.slots[0]
    case.holdings.counts[0, slot] = torch.tensor([0, 56, 0, 0])
    case.holdings.offsets[0, slot] = torch.tensor([0, 0, 56, 56])
    caches = case.caches.tensors[0]
    caches.nan_to_num_(0.5)  # places changed; values of old ones stay random
    assert head_lengths(case.rows, case.holdings, 16)[0, 0].tolist() == [1, 897, 1, 1]
    workspace = space(case, 2, programs=programs)
    check(case, 2, [1] * 3, layers=(0,), workspace=workspace)
    units = workspace.bounds[0, :, 0].diff()
    assert int(units.sum()) == 15 + 11
    assert int(units.max()) == -(-26 // programs)


def test_split_heads_are_spread():
    """A cut is even wherever heads begin: nobody has two units more than another."""
    lengths = [500, 3, 70, 129, 1, 320]
    case = make_case(lengths, [None, None, (3, 4), None, None, (6, 20)], heads=3, layers=2)
    workspace = space(case, 1, programs=11)
    start = torch.arange(7, dtype=torch.int32)
    plan(workspace, case.rows, start, case.holdings, 16)
    held = head_lengths(case.rows, case.holdings, 16)
    for layer in range(2):
        units = workspace.bounds[layer, :, 0].diff()
        total = int((-(-held[layer] // 64)).sum())
        assert int(units.sum()) == total
        assert int(units.max() - units.min()) <= 1


def test_plan_over_several_tiles(monkeypatch):
    """More tasks than the planning kernel takes at once, gaps among them."""
    from uncomp.kernels.decode import launch

    monkeypatch.setitem(launch.PLAN_CONFIG.meta, "TILE", 8)
    monkeypatch.setitem(launch.PROGRAMS_CONFIG.meta, "TILE", 4)
    case = make_case([40, 20, 70, 9, 33, 65], [None, None, (2, 3), None, (1, 2), None], heads=5)
    check(case, 1, [1, 0, 1, 1, 0, 1], layers=(1,), programs=6)


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_soft_cap(cap):
    case = make_case([70, 20], [(2, 3), None], heads=2, spread=3.0)
    check(case, 2, [1, 1], layers=(1,), softcap=cap, programs=3)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_soft_cap_of_huge_logits():
    """e^2x overflows; the cap must not become NaN."""
    case = make_case([40], [None], heads=1, spread=30.0, layers=1)
    query = 30.0 * torch.randn(3, 2, 64)
    check(case, 2, [1], layers=(0,), softcap=5.0, query=query)


@pytest.mark.parametrize("programs", [1, 9])
@pytest.mark.parametrize("shift", [-200.0, 0.0, 200.0])
def test_sinks(programs, shift):
    """Whole heads and split ones; far below and far above every logit."""
    case = make_case([150, 20], [(3, 6), None], heads=2)
    check(case, 3, [2, 1], layers=(0,), sinks=torch.randn(6) + shift, programs=programs)


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float16, FP8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype, cache):
    if cache.itemsize > 1 and cache != dtype:
        case = make_case([9], [None], dtype=cache, heads=1)
        with pytest.raises(ValueError, match="queries for caches of"):
            check(case, 2, [1], dtype=dtype)
        return
    case = make_case([130, 33], [(3, 6), None], heads=2, dtype=cache)
    check(case, 4, [1, 2], dtype=dtype, programs=5)


@pytest.mark.parametrize("shared", [False, True])
def test_float8_scales(shared):
    """Scales of keys and of values, in whole heads and in split ones, exactly."""
    case = make_case([130, 33], [(3, 6), None], heads=2, dtype=FP8, shared=shared)
    assert len(set(case.caches.scales.flatten().tolist())) == 4
    check(case, 2, [1, 1], programs=5)
    check(case, 2, [1, 1], programs=1)


def test_strides():
    """Query and output inside wider tensors, block table cut out of a wider one."""
    case = make_case([70, 33], [(2, 3), None], heads=2, layers=1)
    wide = torch.full((2, case.rows.blocks.shape[1] + 5), -1, dtype=torch.int32)
    wide[:, 3:-2] = case.rows.blocks
    rows = Rows(wide[:, 3:-2], case.rows.lengths, case.rows.slots)
    start = torch.arange(3, dtype=torch.int32)
    query = torch.randn(2, 9, 64)[:, 2:6]
    wide_out = torch.full((4, 2, 70), float("nan"))
    out = wide_out[:, :, 3:67].transpose(0, 1)
    workspace = space(case, 2)
    plan(workspace, rows, start, case.holdings, 16)
    decode(workspace, case.caches, 0, query, out, start, rows, case.holdings, 0.125)
    want = decode_reference(case.caches, 0, query, start, rows, case.holdings, 0.125)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    assert wide_out[:, :, :3].isnan().all()
    assert wide_out[:, :, 67:].isnan().all()


def test_workspace_is_used_again():
    """Steps of other sizes in the same buffers leave nothing behind; the same bits every time."""
    case = make_case(MIXED, COMPACTED, heads=2, layers=1)
    workspace = space(case, 2, programs=6, tokens=2, rows=9)
    query = torch.randn(9, 4, 64)
    first = check(case, 2, [1, 2, 1, 1, 0, 2], layers=(0,), workspace=workspace, query=query)
    small = Case(case.caches, Rows(*(t[2:4] for t in vars(case.rows).values())), case.holdings)
    check(small, 2, [1, 1], layers=(0,), workspace=workspace)
    again = check(case, 2, [1, 2, 1, 1, 0, 2], layers=(0,), workspace=workspace, query=query)
    assert torch.equal(first[0].nan_to_num(7.0), again[0].nan_to_num(7.0))


def test_new_workspace_has_no_work():
    case = make_case([20], [None], heads=2, layers=1)
    workspace = DecodeWorkspace.empty(
        layers=1, rows=2, heads=2, group=2, head_size=64, programs=3, device="cpu"
    )
    out = torch.full((1, 4, 64), 5.0)
    start = torch.arange(2, dtype=torch.int32)
    decode(workspace, case.caches, 0, out.clone(), out, start, case.rows, case.holdings, 1.0)
    assert (out == 5.0).all()


def test_memory_is_as_documented():
    workspace = DecodeWorkspace.empty(
        layers=32, rows=256, heads=8, group=4, head_size=128, programs=528, device="cpu"
    )
    tasks, parts = 36 * 32 * 256 * 8, 8 * 528 * 4 * 130
    small = workspace.memory - tasks - parts
    assert 0 <= small <= 0.2e6
    assert tasks == pytest.approx(2.4e6, rel=0.02)
    assert parts == pytest.approx(2.2e6, rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 17}, "group .* must be 1..16, got 17"),
        ({"query_tokens": 9}, "query_tokens must be 1..8, got 9"),
        ({"head_size": 512}, "head_size must be 16..256, got 512"),
        ({"rows": 0}, "rows must be at least 1"),
        ({"programs": 0}, "programs must be at least 1"),
        ({"chunk": 48}, "power of two from 16 on, got 3 and 48"),
    ],
)
def test_workspace_rejects(change, message):
    numbers = {"layers": 1, "rows": 2, "heads": 2, "group": 2, "head_size": 64, "programs": 3}
    with pytest.raises(ValueError, match=message):
        DecodeWorkspace.empty(**{**numbers, **change}, device="cpu")


def test_rejects_what_does_not_fit():
    case = make_case([20, 9], [None, None], heads=2, layers=2)
    workspace = space(case, 2)
    start = torch.arange(3, dtype=torch.int32)
    query = torch.zeros(2, 4, 64)

    def run(**changed):
        given = {
            "workspace": workspace, "caches": case.caches, "layer": 0, "query": query,
            "out": torch.zeros(2, 4, 64), "query_start": start, "rows": case.rows,
            "holdings": case.holdings, "scale": 1.0,
        }  # fmt: skip
        decode(**{**given, **changed})

    with pytest.raises(ValueError, match="query must be"):
        run(query=query[:, :3])
    with pytest.raises(ValueError, match="out must be"):
        run(out=torch.zeros(2, 4, 64).transpose(1, 2))
    with pytest.raises(ValueError, match="2 query tokens but 3 in out"):
        run(out=torch.zeros(3, 4, 64))
    with pytest.raises(ValueError, match=r"layer must be in 0\.\.1, got 2"):
        run(layer=2)
    with pytest.raises(ValueError, match="do not fit a workspace"):
        run(caches=case.caches.part(0, 1))
    with pytest.raises(ValueError, match=r"sinks must be contiguous float32 \[4\]"):
        run(sinks=torch.zeros(3))
    with pytest.raises(ValueError, match="chunk of 16"):
        run(workspace=space(case, 2, chunk=16), config=CONFIGS[0])
    with pytest.raises(ValueError, match="query_start must be contiguous int32"):
        plan(workspace, case.rows, start.long(), case.holdings, 16)
    with pytest.raises(ValueError, match="2 rows, the workspace has 1"):
        plan(space(case, 2, rows=1), case.rows, start, case.holdings, 16)
    with pytest.raises(ValueError, match=r"holdings\.counts must be"):
        plan(workspace, case.rows, start, Holdings.empty(1, 2, 2, "cpu"), 16)
    shifted = torch.zeros(4 * 2 * 16 * 128 + 1, dtype=torch.float32)[1:].view(4, 2, 16, 128)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        run(caches=Caches.of([shifted, shifted]))
