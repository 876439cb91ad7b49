"""The Triton statistics against the float64 reference on the same cache contents."""

from __future__ import annotations

import pytest
import torch
from paged_cases import Case, Pruned, make_case

from uncomp.kernels.gram import GramStats, gram
from uncomp.kernels.gram.launch import (
    CONFIGS,
    GramBuffers,
    covariance,
    gram_paged,
    gram_rows,
)
from uncomp.kernels.paged import Caches, gather

# Low times low is dropped. The interpreter cuts float32 off to bf16 where GPUs round, so low is up
# to 2^-7 of the value and the loss 2^-14 of a product (2^-18 with rounding).
TOLERANCE = 2.0**-14
#: length, (kept, full) blocks of the requests of a launch; the last is very uneven
LENGTHS = [0, 1, 75, 90]
COMPACTED: list[tuple[int, int] | Pruned | None] = [None, None, Pruned(2, (0, 1, 0)), (2, 4)]


def poisoned(layers: int, requests: int, heads: int, size: int) -> GramBuffers:
    buffers = GramBuffers.empty(layers, requests, heads, size, "cpu")
    for tensor in (buffers.shift, buffers.outer, buffers.total):
        tensor.fill_(float("nan"))
    buffers.count.fill_(-(2**20))
    return buffers


def tables(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def reference(case: Case, stride: list[int]) -> GramStats:
    """In the order of the buffers."""
    parts = []
    for layer in range(case.caches.layers):
        for row, step in enumerate(stride):
            keys, _, lengths = gather(case.caches, case.rows, case.holdings, row, layer)
            parts.append(gram(keys.double(), lengths, step))
    return GramStats(
        *(torch.cat([getattr(p, f) for p in parts]) for f in ("outer", "total", "count"))
    )


def centred(stats: GramStats) -> torch.Tensor:
    count = stats.count.clamp_min(1).double()
    mean = stats.total / count[:, None]
    return stats.outer / count[:, None, None] - mean[:, :, None] * mean[:, None, :]


def assert_alike(got: GramStats, want: GramStats, tolerance: float = TOLERANCE) -> None:
    assert torch.equal(got.count, want.count)
    spread = centred(want).diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    size = want.total.abs() / want.count.clamp_min(1)[:, None]
    # The reference's own float64 sums around zero lose what the mean exceeds the spread by.
    floor = 1e-13 * (1 + (size[:, :, None] * size[:, None, :]))
    error = (centred(got) - centred(want)).abs()
    assert (error <= tolerance * spread[:, :, None] * spread[:, None, :] + floor).all()
    mass = want.count[:, None] * (spread + size)
    assert ((got.total - want.total).abs() <= 1e-6 * mass).all()  # float32 sums of a few rows


CASES = {
    "fp32 HND": {"dtype": torch.float32},
    "bf16 NHD": {"dtype": torch.bfloat16, "layout": "NHD"},
    "fp16 blocks of 32": {"dtype": torch.float16, "block_size": 32},
    "fp8 scaled": {"dtype": torch.float8_e4m3fn},
    "layers share": {"layers": 3, "shared": True},
    "d=80": {"dtype": torch.bfloat16, "head_size": 80, "heads": 2},
    "d=96": {"dtype": torch.bfloat16, "head_size": 96, "heads": 1},
    "d=128": {"dtype": torch.bfloat16, "head_size": 128, "heads": 2, "layout": "NHD"},
}


@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name: str) -> None:
    options = CASES[name]
    lengths = [n + 60 for n in LENGTHS] if options.get("block_size") == 32 else LENGTHS
    case = make_case(lengths, COMPACTED, seed=3, **options)
    stride = [1, 3, 2, 1]
    shape = (case.caches.layers, 4, case.caches.heads, case.caches.head_size)
    out = poisoned(*shape)
    assert gram_paged(case.caches, case.rows, case.holdings, tables(*stride), out) is out
    want = reference(case, stride)
    assert_alike(out.statistics(), want)
    assert (out.outer.transpose(-1, -2) - out.outer).abs().max() <= 1e-6 * out.outer.abs().max()

    got = covariance(out, torch.full_like(out.outer, float("nan"))).view(want.outer.shape).double()
    torch.testing.assert_close(got, want.covariance(), atol=TOLERANCE / 16, rtol=0)
    assert torch.equal(got, got.transpose(1, 2))


def test_parts_of_layers_that_share() -> None:
    case = make_case([90, 75], [(2, 4), (1, 4)], layers=4, shared=True)
    whole = gram_paged(case.caches, case.rows, case.holdings, tables(1, 2))
    for start, stop in ((0, 1), (1, 3), (3, 4)):
        parts = case.caches.part(start, stop), case.rows, case.holdings.part(start, stop)
        got = gram_paged(*parts, tables(1, 2))
        assert got.outer.equal(whole.outer[start:stop])
        assert got.total.equal(whole.total[start:stop])


@pytest.mark.parametrize("size", [192, 256])
def test_large_heads(size: int) -> None:
    case = make_case([40], [(1, 2)], layers=1, heads=2, head_size=size, dtype=torch.bfloat16)
    out = gram_paged(case.caches, case.rows, case.holdings, tables(1), poisoned(1, 1, 2, size))
    assert_alike(out.statistics(), reference(case, [1]))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration(config) -> None:
    case = make_case([75], [(2, 4)], layers=1, heads=2, head_size=80, dtype=torch.bfloat16, seed=1)
    out = gram_paged(
        case.caches, case.rows, case.holdings, tables(2), poisoned(1, 1, 2, 80), config
    )
    assert_alike(out.statistics(), reference(case, [2]))


def shifted(case: Case, mean: torch.Tensor) -> Case:
    """The same with `mean` `[d]` added to all keys."""
    tensors = [t.clone() for t in case.caches.tensors]
    for tensor in tensors:
        tensor[..., : len(mean)] += mean.to(tensor.dtype)
    return Case(Caches.of(tensors), case.rows, case.holdings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mean_far_above_the_spread(dtype: torch.dtype) -> None:
    case = make_case([90, 300], [(2, 4), None], layers=1, heads=2, dtype=dtype)
    case = shifted(case, 500.0 * torch.randn(64))
    out = gram_paged(case.caches, case.rows, case.holdings, tables(1, 2), poisoned(1, 2, 2, 64))
    assert_alike(out.statistics(), reference(case, [1, 2]))
    want = reference(case, [1, 2]).covariance().view(out.outer.shape)
    # The reference sums around zero: 1e-16 times mean² is what its covariance is good for.
    torch.testing.assert_close(covariance(out).double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32]
)
def test_equal_rows_have_no_spread(dtype: torch.dtype) -> None:
    """Lengths that are no powers of two: a mean by a rounded reciprocal would not be exact."""
    case = make_case([5, 41, 1, 0], [None] * 4, layers=1, heads=1)
    value = (30 * torch.randn(64)).to(dtype).float()
    tensor = torch.zeros_like(case.caches.tensors[0]) + torch.cat([value, value])
    caches = Caches.of([tensor.to(dtype)], torch.tensor([[0.3, 0.7]]))
    out = gram_paged(caches, case.rows, case.holdings, tables(1, 1, 1, 1), poisoned(1, 4, 1, 64))
    assert covariance(out).abs().max() == 0
    if dtype != torch.float32:
        assert out.outer.abs().max() == 0


def test_nan_among_the_keys_reaches_the_covariance() -> None:
    case = make_case([20, 20], [None, None], layers=1, heads=1)
    block = int(case.rows.blocks[0, 1])
    case.caches.tensors[0][block, 0, 1, 7] = float("nan")
    out = gram_paged(case.caches, case.rows, case.holdings, tables(1, 1))
    result = covariance(out)
    assert result[0, 0].isnan().any()
    assert result[0, 1].isfinite().all()


def test_stride_below_one_leaves_a_request_alone() -> None:
    case = make_case([20, 20], [None, None], layers=2, heads=1)
    out = poisoned(2, 2, 1, 64)
    out.outer[:, 0] = 7
    gram_paged(case.caches, case.rows, case.holdings, tables(0, 1), out)
    assert (out.outer[:, 0] == 7).all()
    assert (out.count == torch.tensor([-(2**20), 20])[None, :, None]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_fresh_rows_add_up(dtype: torch.dtype) -> None:
    """Two streams, cut differently, one with an empty chunk; the stride runs on over the cuts."""
    heads, size, stride = 3, 80, [3, 2]
    mean = 100 * torch.randn(heads, size)
    streams = [(mean + torch.randn(n, heads, size)).to(dtype) for n in (97, 50)]
    cuts = [[0, 1, 40, 97], [0, 33, 33, 50]]
    out = poisoned(1, 2, heads, size)
    for chunk in range(3):
        parts = [s[c[chunk] : c[chunk + 1]] for s, c in zip(streams, cuts, strict=True)]
        qkv = torch.full(
            (len(parts[0]) + len(parts[1]), heads, 2 * size), float("nan"), dtype=dtype
        )
        qkv[..., :size] = torch.cat(parts)
        starts = tables(0, len(parts[0]), len(qkv))
        seen = tables(*(c[chunk] for c in cuts))
        assert gram_rows(qkv[..., :size], starts, seen, tables(*stride), out) is out
    wants = [
        gram(s.transpose(0, 1).double(), torch.full((heads,), len(s)), step)
        for s, step in zip(streams, stride, strict=True)
    ]
    want = GramStats(
        *(torch.cat([getattr(w, f) for w in wants]) for f in ("outer", "total", "count"))
    )
    # The shift of the first stream is one row, some three spreads off: products are 1 + 9 times as
    # large.
    assert_alike(out.statistics(), want, 10 * TOLERANCE)


def test_a_new_stream_ignores_the_old_one_and_others_are_left_alone() -> None:
    x = torch.randn(30, 2, 64)
    out = poisoned(1, 2, 2, 64)
    gram_rows(x, tables(0, 10, 30), tables(0, 0), tables(1, 1), out)
    before = out.outer.clone()
    gram_rows(x, tables(0, 20, 30), tables(0, 20), tables(1, 0), out)
    want = gram(x[:20].transpose(0, 1).double(), torch.full((2,), 20))
    got = out.statistics()
    assert_alike(GramStats(got.outer[:2], got.total[:2], got.count[:2]), want)
    assert torch.equal(out.outer[:, 1], before[:, 1])


def test_rows_of_eight_bits_and_an_empty_stream() -> None:
    x = torch.randn(20, 2, 64).to(torch.float8_e4m3fn)
    out = gram_rows(x, tables(0, 0, 20), tables(0, 0), tables(1, 1), poisoned(1, 2, 2, 64))
    want = gram(x.double().transpose(0, 1), torch.full((2,), 20))
    got = out.statistics()
    assert_alike(GramStats(got.outer[2:], got.total[2:], got.count[2:]), want)
    assert got.outer[:2].abs().max() == 0
    assert (got.count[:2] == 0).all()
    assert covariance(out)[0, 0].abs().max() == 0


def test_statistics_of_different_shifts_add_up() -> None:
    x = 50 + torch.randn(200, 1, 64)
    parts = []
    for piece in (x[:70], x[70:] + 3):
        out = poisoned(1, 1, 1, 64)
        parts.append(
            gram_rows(piece, tables(0, len(piece)), tables(0), tables(1), out).statistics()
        )
    whole = torch.cat([x[:70], x[70:] + 3]).transpose(0, 1).double()
    assert_alike(parts[0] + parts[1], gram(whole, torch.tensor([200])))
    tensor = covariance(out).view(1, 64, 64).double()
    torch.testing.assert_close(tensor, parts[1].covariance(), atol=1e-6, rtol=0)


def test_layers_of_buffers_are_views() -> None:
    out = poisoned(3, 1, 2, 64)
    gram_rows(torch.randn(9, 2, 64), tables(0, 9), tables(0), tables(1), out.part(1, 2))
    assert out.count.view(3, 2).tolist() == [[-(2**20)] * 2, [9, 9], [-(2**20)] * 2]
    assert out.outer[1].isfinite().all()
    assert out.outer[[0, 2]].isnan().all()


def test_errors_say_what_is_wrong() -> None:
    case = make_case([20], [None], layers=1, heads=1)
    run = (case.caches, case.rows, case.holdings)
    with pytest.raises(ValueError, match=r"stride must be contiguous int32 \[1\]"):
        gram_paged(*run, torch.ones(1))
    with pytest.raises(ValueError, match=r"stride must be contiguous int32 \[1\]"):
        gram_paged(*run, tables(1, 1))
    right = GramBuffers.empty(1, 1, 1, 64, "cpu")
    wrong = GramBuffers(right.shift, right.outer[..., :32], right.total, right.count)
    with pytest.raises(ValueError, match=r"out\.outer must be .*\[1, 1, 1, 64, 64\]"):
        gram_paged(*run, tables(1), wrong)
    with pytest.raises(ValueError, match="allowed: bfloat16"):
        gram_paged(Caches.of([t.double() for t in case.caches.tensors]), *run[1:], tables(1))
    out, x = GramBuffers.empty(1, 1, 2, 64, "cpu"), torch.randn(4, 2, 64)
    with pytest.raises(ValueError, match="last stride 1"):
        gram_rows(x.mT.contiguous().mT, tables(0, 4), tables(0), tables(1), out)
    with pytest.raises(ValueError, match=r"starts must be contiguous int32 \[2\]"):
        gram_rows(x, tables(0), tables(0), tables(1), out)
    with pytest.raises(ValueError, match="covariance: out"):
        covariance(out, torch.empty(2, 64, 64))
