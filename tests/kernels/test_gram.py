"""Covariance statistics: worked numbers, additivity, padding, numerics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from uncomp.kernels.entropy import spectrum
from uncomp.kernels.gram import GramStats, gram, unit_norm_covariance

quick = settings(deadline=None, max_examples=50)

UNIT_NORM_SPECTRA = [
    [1.0, 0.0, 0.0, 0.0],
    [0.25, 0.25, 0.25, 0.25],
    [0.3658696399, 0.3322673040, 0.1742908498, 0.1275722063],
    [0.9106793965, 0.0518207138, 0.0280036090, 0.0094962807],
]
ADDITIVE_SPECTRUM_OF_A = [0.3901408249, 0.3706520229, 0.1601193218, 0.0790878305]


def reference_covariance(rows: Tensor) -> Tensor:
    """One head, float64, by the definition."""
    centred = rows.double() - rows.double().mean(0)
    covariance = centred.T @ centred
    return covariance / covariance.trace()


def test_unit_norm_spectra_match_the_oracle(oracle_heads, oracle_lengths):
    result = spectrum(unit_norm_covariance(oracle_heads, oracle_lengths))
    torch.testing.assert_close(
        result, torch.tensor(UNIT_NORM_SPECTRA, dtype=torch.float64), rtol=0, atol=1e-9
    )


def test_additive_spectrum_matches_the_oracle(oracle_heads, oracle_lengths):
    result = spectrum(gram(oracle_heads, oracle_lengths).covariance())[2]
    torch.testing.assert_close(
        result, torch.tensor(ADDITIVE_SPECTRUM_OF_A, dtype=torch.float64), rtol=0, atol=1e-9
    )


@quick
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 99))
def test_chunks_add_up_to_the_whole(chunk_sizes, seed):
    torch.manual_seed(seed)
    x = torch.randn(2, sum(chunk_sizes), 5, dtype=torch.float64)
    whole = gram(x, torch.full((2,), x.shape[1]))
    parts = [gram(chunk, torch.full((2,), chunk.shape[1])) for chunk in x.split(chunk_sizes, 1)]
    added = parts[0]
    for part in parts[1:]:
        added = added + part
    assert added.count.equal(whole.count)
    torch.testing.assert_close(added.outer, whole.outer, rtol=0, atol=1e-10)
    torch.testing.assert_close(added.total, whole.total, rtol=0, atol=1e-10)
    torch.testing.assert_close(added.covariance(), whole.covariance(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [1, 64, 80, 128], ids=lambda d: f"d{d}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_low_precision_agrees_with_float64(size, dtype):
    # A mean far larger than the spread, as some key channels have it, is the hard case.
    x = (torch.randn(3, 700, size) + 300.0).to(dtype)
    lengths = torch.tensor([700, 1, 333])
    covariance = gram(x, lengths).covariance()
    for head in (0, 2):
        expected = reference_covariance(x[head, : lengths[head]])
        torch.testing.assert_close(covariance[head], expected, rtol=0, atol=1e-6)
    assert covariance[1].abs().max() == 0  # one token has no spread


@pytest.mark.parametrize("function", ["gram", "unit_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_padding_never_matters(function, dtype):
    lengths = torch.tensor([0, 1, 7, 12])
    x = torch.randn(4, 12, 6, dtype=dtype)
    poisoned = x.clone()
    for head, length in enumerate(lengths.tolist()):
        poisoned[head, length:] = float("nan")

    def run(rows: Tensor, count: Tensor) -> Tensor:
        if function == "gram":
            return gram(rows, count).covariance()
        return unit_norm_covariance(rows, count)

    result = run(poisoned, lengths)
    assert result.isfinite().all()
    for head, length in enumerate(lengths.tolist()):
        alone = run(x[head : head + 1, :length], lengths[head : head + 1])[0]
        torch.testing.assert_close(result[head], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2, 5, 50])
def test_stride_takes_every_nth_valid_row(stride):
    x = torch.randn(3, 20, 4, dtype=torch.float64)
    lengths = torch.tensor([20, 11, 1])
    stats = gram(x, lengths, stride)
    for head, length in enumerate(lengths.tolist()):
        rows = x[head, :length:stride]
        assert stats.count[head] == len(rows)
        torch.testing.assert_close(stats.outer[head], rows.T @ rows)
        torch.testing.assert_close(stats.total[head], rows.sum(0))


def test_strided_chunks_add_up_on_multiples_of_the_stride():
    x = torch.randn(1, 24, 4, dtype=torch.float64)
    whole = gram(x, torch.tensor([24]), 4)
    parts = gram(x[:, :8], torch.tensor([8]), 4) + gram(x[:, 8:], torch.tensor([16]), 4)
    torch.testing.assert_close(parts.outer, whole.outer)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_equal_tokens_have_no_spread(value, dtype):
    x = torch.full((1, 1000, 8), value, dtype=dtype)
    lengths = torch.tensor([1000])
    assert gram(x, lengths).covariance().abs().max() == 0
    assert unit_norm_covariance(x, lengths).abs().max() == 0


@pytest.mark.parametrize("offset", [0.0, 0.1, 100.0])
def test_token_equal_to_the_mean_weighs_nothing(offset):
    rows = torch.tensor([[1.1, 0.3], [0.7, -0.9], [-1.8, 0.6]])
    rows = torch.cat([rows, rows[:1]]).double() + offset
    rows[3] = rows[:3].mean(0)
    with_mean = unit_norm_covariance(rows[None], torch.tensor([4]))
    without = unit_norm_covariance(rows[None, :3], torch.tensor([3]))
    torch.testing.assert_close(with_mean, without)


def test_covariance_is_symmetric_with_trace_one():
    covariance = gram(torch.randn(3, 50, 16), torch.tensor([50, 20, 2])).covariance()
    assert covariance.equal(covariance.transpose(1, 2))
    torch.testing.assert_close(
        covariance.diagonal(dim1=1, dim2=2).sum(1), torch.ones(3, dtype=torch.float64)
    )


def test_empty_input_is_the_neutral_element():
    empty = gram(torch.empty(2, 0, 4), torch.zeros(2, dtype=torch.int64))
    some = gram(torch.randn(2, 9, 4), torch.tensor([9, 3]))
    both = empty + some
    assert isinstance(both, GramStats)
    assert both.outer.equal(some.outer)
    assert empty.covariance().abs().max() == 0


def test_inputs_stay_untouched():
    x = torch.randn(2, 9, 4)
    before = x.clone()
    gram(x, torch.tensor([9, 3]))
    unit_norm_covariance(x, torch.tensor([9, 3]))
    assert x.equal(before)


def test_errors_name_what_was_given():
    with pytest.raises(ValueError, match=r"stride must be at least 1, got 0"):
        gram(torch.zeros(1, 2, 3), torch.tensor([2]), 0)
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        gram(torch.zeros(2, 3), torch.tensor([2]))
    with pytest.raises(ValueError, match=r"unit_norm_covariance needs"):
        unit_norm_covariance(torch.zeros(1, 2, 3), torch.tensor([2, 2]))
