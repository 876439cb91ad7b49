"""What is compiled in the absence of a GPU (`uncomp.kernels.compile`)."""

from __future__ import annotations

import triton

from uncomp.kernels.variant import Config, Variant

from .kernel import entropy_kernel, tridiagonal_kernel
from .launch import BISECTION_CONFIGS, CONFIGS, pick


def _tridiagonal(size: int, config: Config) -> Variant:
    pointers = ("covariance_ptr", "matrix_ptr", "vectors_ptr", "diagonal_ptr", "squares_ptr")
    return Variant(
        f"tridiagonal d={size}",
        tridiagonal_kernel,
        dict.fromkeys(pointers, "*fp32"),
        {"HEAD_SIZE": size, "PADDED": triton.next_power_of_2(size)},
        config,
        config == pick(size),
    )


def _entropy(size: int, config: Config) -> Variant:
    pointers = ("diagonal_ptr", "squares_ptr", "eigenvalues_ptr", "entropy_ptr")
    constants = {"HEAD_SIZE": size, "PADDED": triton.next_power_of_2(size)}
    return Variant(
        f"entropy d={size}",
        entropy_kernel,
        {**dict.fromkeys(pointers, "*fp32"), "scale": "fp32"},
        {"KEPT": size // 4, "RENORMALIZED": True, **constants},
        config,
        config == BISECTION_CONFIGS[0],
    )


VARIANTS: list[Variant] = [
    *(_tridiagonal(size, pick(size)) for size in (64, 96, 128, 256)),
    *(_tridiagonal(128, config) for config in CONFIGS if config != pick(128)),
    *(_tridiagonal(256, config) for config in CONFIGS if config != pick(256)),
    *(_entropy(size, BISECTION_CONFIGS[0]) for size in (64, 128, 256)),
    *(_entropy(128, config) for config in BISECTION_CONFIGS[1:]),
]
