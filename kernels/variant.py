"""Launch configurations and the compiled variants of a kernel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Config:
    """How a kernel is tiled.

    Attributes:
        meta: constexpr arguments that do not change the result (block sizes).
        num_warps, num_stages: Triton's launch options.
    """

    meta: dict[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    def __str__(self) -> str:
        meta = " ".join(f"{name}={value}" for name, value in self.meta.items())
        return f"{meta} warps={self.num_warps} stages={self.num_stages}".strip()


@dataclass(frozen=True)
class Variant:
    """One way a kernel is compiled.

    Attributes:
        name: kernel and what sets this variant apart ("gram bf16 d=128").
        kernel: the `@triton.jit` function.
        signature: argument -> type ("*bf16", "*i64", "i32", "fp32"); constexprs are left out.
        constants: constexpr argument -> value, without those of `config`.
        config: tiling.
        default: whether the launcher picks this one; it must not spill registers.
        skip: targets (see `uncomp.kernels.compile`) that cannot run it -> why.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    config: Config
    default: bool = True
    skip: dict[str, str] = field(default_factory=dict)
