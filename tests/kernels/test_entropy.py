"""Truncated matrix entropy: worked numbers, invariances, range."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from uncomp.kernels.entropy import MEASURES, default_truncation, spectrum, truncated_entropy
from uncomp.kernels.gram import gram, unit_norm_covariance

quick = settings(deadline=None, max_examples=50)

# Rows: the four heads of the worked example. Unit-norm covariance, not divided by ln d.
ORACLE = [
    ("raw", 1, [0.0, 0.3465735903, 0.3678739412, 0.0852071426]),
    ("raw", 2, [0.0, 0.6931471806, 0.7339712073, 0.2385946588]),
    ("raw", 3, [0.0, 1.0397207708, 1.0384625201, 0.3387193752]),
    ("raw", 4, [0.0, 1.3862943611, 1.3011429739, 0.3829421780]),
    ("renormalized", 1, [0.0, 0.0, 0.0, 0.0]),
    ("renormalized", 2, [0.0, 0.6931471806, 0.6919884152, 0.2096694280]),
    ("renormalized", 3, [0.0, 1.0986122887, 1.0538380444, 0.3324251300]),
    ("renormalized", 4, [0.0, 1.3862943611, 1.3011429739, 0.3829421780]),
    ("full", 2, [0.0, 1.3862943611, 1.3011429739, 0.3829421780]),
]
NORMALIZED_FULL = [0.0, 1.0, 0.9385762579, 0.2762343906]
EXP_FULL = [1.0, 4.0, 3.6734929755, 1.4665932263]

# exponent a of λ_i ~ i^-a at d = 128: full, raw k=32, renormalised k=32, all divided by ln d.
POWER_LAWS = [
    (0.0, 1.0, 0.25, 0.7143),
    (0.5, 0.9632, 0.3962, 0.6891),
    (1.0, 0.7933, 0.4877, 0.5927),
    (1.5, 0.5290, 0.4254, 0.4429),
    (2.0, 0.3262, 0.3015, 0.3029),
]


@pytest.mark.parametrize(("measure", "k", "expected"), ORACLE, ids=lambda v: str(v)[:12])
def test_oracle_entropies(oracle_heads, oracle_lengths, measure, k, expected):
    values = spectrum(unit_norm_covariance(oracle_heads, oracle_lengths))
    result = truncated_entropy(values, k, measure, normalized=False)
    torch.testing.assert_close(
        result, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9
    )


def test_oracle_normalised_entropy_and_effective_rank(oracle_heads, oracle_lengths):
    values = spectrum(unit_norm_covariance(oracle_heads, oracle_lengths))
    normalised = truncated_entropy(values, measure="full")
    rank = truncated_entropy(values, measure="full", normalized=False).exp()
    for result, expected in ((normalised, NORMALIZED_FULL), (rank, EXP_FULL)):
        torch.testing.assert_close(
            result, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9
        )


def test_oracle_additive_form(oracle_heads, oracle_lengths):
    values = spectrum(gram(oracle_heads, oracle_lengths).covariance())
    result = truncated_entropy(values, measure="full", normalized=False)[2]
    assert result.item() == pytest.approx(1.2290617844, abs=1e-9)


@pytest.mark.parametrize(("exponent", "full", "raw", "renormalized"), POWER_LAWS)
def test_raw_entropy_of_power_laws_is_not_monotone(exponent, full, raw, renormalized):
    values = torch.arange(1, 129, dtype=torch.float64)[None] ** -exponent
    values = values / values.sum()
    assert truncated_entropy(values, 32, "full").item() == pytest.approx(full, abs=5e-5)
    assert truncated_entropy(values, 32, "raw").item() == pytest.approx(raw, abs=5e-5)
    assert truncated_entropy(values, 32, "renormalized").item() == pytest.approx(
        renormalized, abs=5e-5
    )


def entropies(x: Tensor, form: str) -> Tensor:
    """Every measure at every k for one head; `[measures * d]`."""
    lengths = torch.tensor([x.shape[0]])
    if form == "additive":
        covariance = gram(x[None], lengths).covariance()
    else:
        covariance = unit_norm_covariance(x[None], lengths)
    values = spectrum(covariance)
    return torch.cat(
        [truncated_entropy(values, k, m) for m in MEASURES for k in range(1, x.shape[1] + 1)]
    )


forms = st.sampled_from(["additive", "unit-norm"])
matrices = st.builds(
    lambda seed, tokens, size: torch.randn(
        tokens, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ),
    st.integers(0, 9999),
    st.integers(2, 40),
    st.integers(1, 9),
)


def random_rotation(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(matrix).Q


def assert_same(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=1e-7)


@quick
@given(matrices, forms, st.integers(0, 99))
def test_invariant_to_rotation(x, form, seed):
    assert_same(entropies(x @ random_rotation(x.shape[1], seed), form), entropies(x, form))


@quick
@given(matrices, forms, st.floats(1e-3, 1e3))
def test_invariant_to_scaling(x, form, factor):
    assert_same(entropies(x * factor, form), entropies(x, form))


@quick
@given(matrices, forms, st.randoms(use_true_random=False))
def test_invariant_to_token_order(x, form, random):
    order = list(range(len(x)))
    random.shuffle(order)
    assert_same(entropies(x[order], form), entropies(x, form))


@quick
@given(matrices, forms, st.integers(2, 4))
def test_invariant_to_duplicating_all_tokens(x, form, times):
    assert_same(entropies(x.repeat(times, 1), form), entropies(x, form))


@quick
@given(matrices, forms)
def test_normalised_entropy_is_between_0_and_1(x, form):
    result = entropies(x, form)
    assert (result >= 0).all()
    assert (result <= 1).all()


@pytest.mark.parametrize("size", [2, 64, 80, 128, 256])
def test_isotropic_entropy_is_exactly_at_most_one(size):
    values = torch.full((1, size), 1 / size, dtype=torch.float64)
    result = truncated_entropy(values, measure="full").item()
    assert result <= 1
    assert result == pytest.approx(1)


@pytest.mark.parametrize("measure", MEASURES)
def test_head_without_spread_has_entropy_zero(measure):
    values = spectrum(torch.zeros(2, 6, 6))
    assert values.tolist() == [[1, 0, 0, 0, 0, 0]] * 2
    assert truncated_entropy(values, measure=measure).tolist() == [0, 0]


@pytest.mark.parametrize("measure", MEASURES)
def test_head_size_one(measure):
    assert truncated_entropy(spectrum(torch.ones(3, 1, 1)), measure=measure).tolist() == [0, 0, 0]


def test_spectrum_is_descending_and_sums_to_one():
    x = torch.randn(4, 30, 12)
    values = spectrum(x.transpose(1, 2) @ x)
    assert (values.diff(dim=1) <= 0).all()
    assert (values >= 0).all()
    torch.testing.assert_close(values.sum(1), torch.ones(4, dtype=torch.float64))


def test_negative_rounding_noise_is_clipped():
    values = spectrum(torch.diag(torch.tensor([1.0, -1e-12], dtype=torch.float64))[None])
    assert values.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(("size", "k"), [(1, 1), (3, 1), (64, 16), (80, 20), (128, 32), (256, 64)])
def test_default_truncation_is_a_quarter(size, k):
    assert default_truncation(size) == k
    values = torch.rand(2, size, dtype=torch.float64)
    values = values / values.sum(1, keepdim=True)
    assert truncated_entropy(values).equal(truncated_entropy(values, k))


def test_entropy_uses_the_natural_logarithm():
    values = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    assert truncated_entropy(values, 2, normalized=False).item() == pytest.approx(math.log(2))


def test_errors_name_what_was_given():
    values = torch.full((1, 4), 0.25)
    with pytest.raises(ValueError, match=r"1\.\.4 .*got 5"):
        truncated_entropy(values, 5)
    with pytest.raises(ValueError, match=r"got 0"):
        truncated_entropy(values, 0)
    with pytest.raises(ValueError, match=r"'rawish'; allowed: raw, renormalized, full"):
        truncated_entropy(values, 2, "rawish")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[4\]"):
        truncated_entropy(values[0], 2)
    with pytest.raises(ValueError, match=r"needs \[B, d, d\], got \[1, 2, 3\]"):
        spectrum(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="NaN"):
        spectrum(torch.full((1, 2, 2), float("nan")))
