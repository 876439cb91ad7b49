"""The paged window scores against `naive.window_scores` in float64 on gathered keys."""

import dataclasses

import pytest
import torch
from paged_cases import Pruned, make_case

from uncomp.kernels.paged import Rows, gather, head_lengths
from uncomp.kernels.variant import Config
from uncomp.kernels.window_scores import window_scores
from uncomp.kernels.window_scores.launch import window_scores_paged, workspace_size

#: several tiles a chunk, several chunks a head at these lengths
SMALL = Config({"CHUNK": 32, "BLOCK_N": 16})
#: Sums of at most 64 float32 probabilities; the largest rounding error comes from logits of
#: magnitude up to about 20: 20 * 2^-24 * a few roundings, relative to each probability.
TOLERANCE = {"rtol": 2e-5, "atol": 1e-7}


def reference(case, queries, scale, softcap, reduce, layer, row, over="sum"):
    """`[H, N]` float64; -1 beyond the entries."""
    keys, _, lengths = gather(case.caches, case.rows, case.holdings, row, layer)
    heads, window = case.caches.heads, queries.shape[2]
    # Only the order of positions matters: entry e of n lies w - n + e away from the first query.
    entry = torch.arange(keys.shape[1])
    positions = entry - lengths[:, None] + window
    grouped = queries[layer, row].double().unflatten(1, (heads, -1)).permute(1, 2, 0, 3)
    scores = window_scores(
        grouped, keys.double(), lengths, positions, torch.arange(window),
        float(scale[layer]), 0.0 if softcap is None else float(softcap[layer]), reduce,
        over,
    )  # fmt: skip
    return scores.masked_fill(entry >= lengths[:, None], -1.0)


def check(
    case,
    window,
    group=2,
    softcap=None,
    reduce="sum",
    config=SMALL,
    dtype=None,
    sharp=1.0,
    over="sum",
):
    caches, heads = case.caches, case.caches.heads
    layers, requests, size = caches.layers, case.rows.lengths.shape[0], caches.head_size
    shape = (layers, requests, window, heads * group, size)
    queries = (sharp * torch.randn(shape)).to(dtype or caches.dtype)
    # Each layer its own factor: a kernel that reads the wrong layer's must fail.
    scale = size**-0.5 * torch.linspace(1.0, 1.5, layers)
    lengths = head_lengths(case.rows, case.holdings, caches.block_size)
    entries = int(lengths.max()) + 5
    out = torch.full((layers, requests, heads, entries), float("nan"))
    workspace = torch.full(
        (workspace_size(layers, requests, heads * group, window, entries, config),), float("nan")
    )
    result = window_scores_paged(
        caches, case.rows, case.holdings, queries, scale, softcap, reduce, out, workspace, config,
        over,
    )  # fmt: skip
    assert result is out
    for layer in range(layers):
        for row in range(requests):
            expected = reference(case, queries, scale, softcap, reduce, layer, row, over)
            width = expected.shape[1]
            got = out[layer, row]
            beyond = torch.arange(entries) >= lengths[layer, row][:, None]
            assert bool(got.isnan()[beyond].all()), "written beyond the entries"
            got = got.masked_fill(beyond, -1.0)[:, :width].double()
            torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_plain_and_compacted_rows_of_unequal_length(layout, reduce):
    case = make_case([70, 83, 9], [None, (2, 4), None], layout=layout)
    check(case, window=8, reduce=reduce)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_layers_that_share(layout):
    case = make_case([70, 83, 9], [(1, 4), (2, 4), None], layers=4, layout=layout, shared=True)
    check(case, window=8)
    parts = case.caches.part(2, 4), case.rows, case.holdings.part(2, 4)
    queries, scale = torch.randn(4, 3, 8, 6, 64), torch.ones(4)
    out = torch.full((4, 3, 3, 160), -1.0)
    window_scores_paged(case.caches, case.rows, case.holdings, queries, scale, None, "sum", out)
    got = torch.full((2, 3, 3, 160), -1.0)
    window_scores_paged(*parts, queries[2:], scale[2:], None, "sum", got)
    assert got.equal(out[2:])


def test_pruned_prompts():
    check(make_case([70, 83], [Pruned(4, (0, 3)), Pruned(5, (1, 2))]), window=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    # Products of 16-bit numbers are exact in float32: the same tolerance.
    check(make_case([40], [(1, 2)], dtype=dtype, layers=1, spread=2.0), window=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_keys_are_dequantised_by_the_scale_of_their_layer(dtype):
    case = make_case([40], [(1, 2)], dtype=torch.float8_e4m3fn)
    check(case, window=4, dtype=dtype)


@pytest.mark.parametrize("size", [80, 96, 192, 256])
def test_head_sizes(size):
    case = make_case([35], [None], layers=1, heads=2, head_size=size)
    case.caches.tensors[0][..., size:] = torch.inf  # values lie behind keys and are not read
    check(case, window=3)


@pytest.mark.parametrize(
    ("heads", "group", "window", "reduce"),
    [
        (1, 1, 1, "sum"),
        (1, 1, 1, "max"),
        (3, 5, 6, "max"),
        (5, 3, 7, "sum"),
        (1, 16, 8, "max"),  # two tiles of whole query heads
        (1, 16, 8, "sum"),
        (1, 2, 70, "max"),  # a query head fills two tiles
        (1, 2, 70, "sum"),
    ],
)
def test_groups_and_windows(heads, group, window, reduce):
    case = make_case([max(43, window + 2)], [None], layers=1, heads=heads, head_size=16)
    check(case, window, group, reduce=reduce)


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize(
    ("heads", "group", "window"),
    [
        (1, 1, 1),
        (2, 3, 8),  # a padded query head in the tile
        (1, 7, 32),  # four tiles of two heads, the last one half empty
        (1, 4, 20),
        (1, 2, 100),  # a query head fills two tiles, the second of them partly
    ],
)
def test_largest_of_the_window(heads, group, window, reduce):
    case = make_case([window + 9], [None], layers=1, heads=heads, head_size=16)
    check(case, window, group, reduce=reduce, over="max")


def test_softcap_of_each_layer():
    case = make_case([40], [None], layers=3, spread=3.0)
    check(case, window=4, softcap=torch.tensor([5.0, 0.0, 30.0]), sharp=2.0)


def test_sharp_attention_neither_overflows_nor_vanishes():
    # Logits of several hundred: only a maximum per query keeps the exponentials finite. The
    # float32 rounding of such a logit is 2^-24 * 500 = 3e-5, hence the looser tolerance.
    case = make_case([50], [None], layers=1, heads=1, spread=8.0)
    queries = 16.0 * torch.randn(1, 1, 4, 2, 64)
    out = torch.empty(1, 1, 1, 50)
    scale = torch.tensor([0.125])
    arguments = (case.caches, case.rows, case.holdings, queries, scale, None, "sum", out)
    window_scores_paged(*arguments, config=SMALL)
    expected = reference(case, queries, scale, None, "sum", 0, 0)
    torch.testing.assert_close(out[0, 0].double(), expected, rtol=1e-3, atol=1e-6)
    assert out.sum().item() == pytest.approx(8.0, rel=1e-5)


def test_heads_shorter_than_the_window():
    """The first queries see nothing; the empty head has nothing to write."""
    case = make_case([3, 0, 1], [None, None, None], layers=1)
    check(case, window=8)


def test_the_default_configuration_and_no_workspace():
    case = make_case([1100], [None], layers=1, heads=1, head_size=16)
    queries = torch.randn(1, 1, 8, 4, 16)
    out, scale = torch.empty(1, 1, 1, 1100), torch.tensor([0.25])
    window_scores_paged(case.caches, case.rows, case.holdings, queries, scale, None, "sum", out)
    expected = reference(case, queries, scale, None, "sum", 0, 0)
    torch.testing.assert_close(out[0, 0].double(), expected, **TOLERANCE)


def test_strided_queries_and_block_rows():
    case = make_case([40, 20], [None, (1, 1)])
    blocks = torch.full((2, case.rows.blocks.shape[1] + 5), -7, dtype=torch.int32)
    blocks[:, :-5] = case.rows.blocks
    rows = Rows(blocks[:, :-5], case.rows.lengths, case.rows.slots)
    case = dataclasses.replace(case, rows=rows)
    padded = torch.randn(2, 4, 2, 3, 6, 128).transpose(1, 2)  # [L, R, w, ?, Hq, 2 d]
    queries = padded[:, :, :, 1, :, 64:]
    scale = torch.tensor([0.1, 0.2])
    out = torch.zeros(2, 2, 3, 40)
    window_scores_paged(
        case.caches, case.rows, case.holdings, queries, scale, None, "sum", out, None, SMALL
    )
    for layer in range(2):
        for row in range(2):
            expected = reference(case, queries, scale, None, "sum", layer, row).clamp_min(0)
            got = out[layer, row, :, : expected.shape[1]].double()
            torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.randn(2, 1, 4, 7, 64)}, "queries must be"),
        ({"queries": torch.randn(2, 1, 4, 6, 64).half()}, "do not go with caches"),
        ({"scale": torch.ones(3)}, "scale must be float32"),
        ({"softcap": torch.ones(2).double()}, "softcap must be float32"),
        ({"reduce": "mean"}, "reduce must be 'sum' or 'max', got 'mean'"),
        ({"out": torch.empty(2, 1, 4, 40)}, "out must be"),
        ({"out": torch.empty(2, 1, 40, 3).transpose(2, 3)}, "contiguous"),
        ({"workspace": torch.empty(3)}, "workspace must be"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    case = make_case([40], [None])
    given = {
        "queries": torch.randn(2, 1, 4, 6, 64),
        "scale": torch.ones(2),
        "softcap": None,
        "reduce": "sum",
        "out": torch.empty(2, 1, 3, 40),
        "workspace": None,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        window_scores_paged(case.caches, case.rows, case.holdings, **given)
