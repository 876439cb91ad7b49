"""The Triton entropy against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from uncomp.kernels.entropy import MEASURES, spectrum, truncated_entropy
from uncomp.kernels.entropy.launch import (
    BISECTION_CONFIGS,
    CONFIGS,
    Scratch,
    renyi2_entropy,
    spectral_entropy,
)
from uncomp.kernels.variant import Config

#: measured: at most 1e-6 (float32 rounding, 6e-8 of the largest eigenvalue, where λ ln λ is steep)
TOLERANCE = 2e-6


def with_spectrum(eigenvalues: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A float32 matrix with a random eigenbasis and trace one."""
    random = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    basis = torch.randn(size, size, dtype=torch.float64, generator=random)
    basis = torch.linalg.qr(basis).Q
    matrix = (basis * eigenvalues.double()) @ basis.T
    return ((matrix + matrix.T) / (2 * matrix.trace())).float()


def spectra(size: int) -> dict[str, torch.Tensor]:
    index = torch.arange(size, dtype=torch.float64)
    return {
        "flat": torch.ones(size),
        "1/i": 1 / (1 + index),
        "geometric": 0.7**index,
        "eight decades": 10 ** (-8 * index / size),
        "rank d/4": (index < size // 4).double(),
        "rank 1": (index < 1).double(),
        "clusters": 1 + 1e-4 * (index % 3) + 10 * (index < size // 8),
    }


def poisoned(batch: int, size: int) -> Scratch:
    scratch = Scratch.empty(batch, size, "cpu")
    for tensor in vars(scratch).values():
        tensor.fill_(float("nan"))
    return scratch


def check(matrices: torch.Tensor, measure="full", k: int | None = None, config=None) -> None:
    batch, size, _ = matrices.shape
    scratch, out = poisoned(batch, size), torch.full((batch,), float("nan"))
    before = matrices.clone()
    assert spectral_entropy(matrices, k, measure, scratch, out, config) is out
    want = spectrum(matrices)
    torch.testing.assert_close(
        out.double(), truncated_entropy(want, k, measure), atol=TOLERANCE, rtol=0
    )
    torch.testing.assert_close(scratch.eigenvalues.double(), want, atol=5e-7, rtol=0)
    assert torch.equal(matrices, before)


@pytest.mark.parametrize("measure", MEASURES)
def test_measures(measure: str) -> None:
    matrices = torch.stack([with_spectrum(s) for s in list(spectra(16).values())[1:4]])
    check(matrices, measure)
    check(matrices[:1], measure, k=5)


@pytest.mark.parametrize("name", spectra(2))
def test_spectra(name: str) -> None:
    check(with_spectrum(spectra(33)[name])[None])


@pytest.mark.parametrize("size", [64, 80, 96, 128, 192, 256])
def test_head_sizes(size: int) -> None:
    """The default tiling; the spectrum of keys: a few strong directions and a long tail."""
    check(with_spectrum(1 / (1 + torch.arange(size)) ** 1.5)[None])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration(config) -> None:
    check(with_spectrum(spectra(40)["1/i"])[None], config=config)


@pytest.mark.parametrize("config", BISECTION_CONFIGS, ids=str)
def test_every_bisection(config) -> None:
    matrix = with_spectrum(spectra(20)["1/i"])[None]
    got = spectral_entropy(matrix, measure="full", bisection=config)
    want = truncated_entropy(spectrum(matrix), measure="full")
    torch.testing.assert_close(got.double(), want, atol=TOLERANCE, rtol=0)


def test_a_pivot_of_zero() -> None:
    """The first halving of the bracket, 1.0001 times the largest, meets an eigenvalue exactly."""
    middle = torch.tensor(0.5) * 1.0001 * 0.5
    check(torch.diag(torch.stack([torch.tensor(0.5), middle, 0.5 - middle]))[None])


def test_negative_eigenvalues_count_as_zero() -> None:
    values = torch.linspace(-0.2, 1.0, 18)
    check(with_spectrum(values)[None])
    check(with_spectrum(values)[None], "renormalized", k=7)


@pytest.mark.parametrize("size", [2, 3])
def test_smallest_sizes(size: int) -> None:
    check(torch.stack([with_spectrum(torch.rand(size), seed) for seed in range(3)]), k=1)


def test_special_matrices() -> None:
    """Diagonal (nothing to remove), tridiagonal, already blocks; another trace than one."""
    size = 16
    diagonal = torch.diag(torch.arange(1.0, size + 1))
    tridiagonal = (
        2 * torch.eye(size) - torch.eye(size).roll(1, 0).tril() - torch.eye(size).roll(1, 1).triu()
    )
    blocks = torch.block_diag(*[with_spectrum(torch.rand(size // 2), s) for s in (0, 1)])
    matrices = torch.stack([diagonal, tridiagonal, blocks])
    check(matrices)
    check(matrices[2:] * 1e-12)
    check(matrices[2:] * 1e12)


def test_only_the_symmetric_part_counts() -> None:
    matrix = with_spectrum(spectra(16)["1/i"])
    noise = torch.randn(16, 16)
    check((matrix + noise - noise.T)[None])


def test_zero_matrix() -> None:
    scratch = poisoned(1, 20)
    for measure in MEASURES:
        assert spectral_entropy(torch.zeros(1, 20, 20), None, measure, scratch).item() == 0  # type: ignore[arg-type]


def test_nan_and_infinity_give_nan() -> None:
    """On the diagonal, on the last subdiagonal, elsewhere; the last of the batch is sound."""
    good = with_spectrum(spectra(12)["1/i"])
    matrices = good.repeat(9, 1, 1)
    values = [
        (v, at) for v in (torch.nan, torch.inf) for at in ((0, 0), (7, 3), (11, 11), (10, 11))
    ]
    for matrix, (value, place) in zip(matrices, values, strict=False):
        matrix[place] = value
    quick = Config({"HALVINGS": 3})  # precision does not matter here
    result = spectral_entropy(matrices, scratch=poisoned(9, 12), bisection=quick)
    assert result[:-1].isnan().all()
    assert result[-1].isfinite()


def test_part_of_a_scratch() -> None:
    matrices = torch.stack([with_spectrum(torch.rand(16), seed) for seed in range(2)])
    scratch = poisoned(5, 16)
    got = spectral_entropy(matrices, measure="full", scratch=scratch.part(2))
    want = truncated_entropy(spectrum(matrices), measure="full")
    torch.testing.assert_close(got.double(), want, atol=TOLERANCE, rtol=0)
    assert scratch.matrix[2:].isnan().all()


def test_renyi2_bounds() -> None:
    size = 64
    flat, point = torch.eye(size)[None] / size, torch.zeros(1, size, size)
    point[0, 3, 3] = 0.2
    assert renyi2_entropy(flat).item() == pytest.approx(1.0, abs=1e-6)
    assert renyi2_entropy(point).item() == pytest.approx(0.0, abs=1e-6)
    assert renyi2_entropy(torch.zeros(1, size, size)).item() == 0
    assert renyi2_entropy(point * float("nan")).isnan().all()
    some = torch.stack([with_spectrum(s) for s in spectra(size).values()]).double()
    full = truncated_entropy(spectrum(some), measure="full")
    assert (renyi2_entropy(some) <= full + 1e-6).all()


def random_spectra(count: int, size: int) -> torch.Tensor:
    """`[count, size]`, sum 1: power laws of random exponent with random noise on every eigenvalue,
    and 0 to 4 dominant directions, like keys with a few large channels."""
    index = torch.arange(1, size + 1, dtype=torch.float64)
    power = index ** -(2 * torch.rand(count, 1, dtype=torch.float64))
    values = power * torch.exp(0.3 * torch.randn(count, size, dtype=torch.float64))
    values[:, :4] *= 1 + 30 * torch.rand(count, 4) * (torch.rand(count, 4) < 0.3)
    return values / values.sum(1, keepdim=True)


def rank_agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's coefficient."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def test_renyi2_ranks_heads_nearly_like_the_entropies() -> None:
    values = random_spectra(1000, 128).sort(1, descending=True).values
    renyi = renyi2_entropy(torch.diag_embed(values))
    # The README quotes these bounds.
    agreement = {m: rank_agreement(renyi, truncated_entropy(values, measure=m)) for m in MEASURES}
    assert agreement["full"] > 0.95
    assert agreement["renormalized"] > 0.95


def test_errors_say_what_is_wrong() -> None:
    matrix = torch.eye(16)[None] / 16
    with pytest.raises(ValueError, match=r"\[B, d, d\]"):
        spectral_entropy(matrix[0])
    with pytest.raises(ValueError, match=r"d in 2\.\.256"):
        spectral_entropy(torch.zeros(1, 257, 257))
    with pytest.raises(ValueError, match="must be contiguous float32"):
        spectral_entropy(matrix.double())
    with pytest.raises(ValueError, match="unknown entropy measure"):
        spectral_entropy(matrix, measure="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"k must be in 1\.\.16"):
        spectral_entropy(matrix, k=17)
    with pytest.raises(ValueError, match=r"scratch\.matrix must be .*\[1, 16, 16\]"):
        spectral_entropy(matrix, scratch=Scratch.empty(2, 16, "cpu"))
