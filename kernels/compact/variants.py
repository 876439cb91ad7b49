"""Compiled variants. Entries are copied as words, so bf16, fp16 and fp8 of twice the head size are
the same kernel."""

from __future__ import annotations

import triton

from uncomp.kernels.compact.kernel import gather_kernel, scatter_kernel
from uncomp.kernels.compact.launch import CONFIGS, choose
from uncomp.kernels.variant import Config, Variant

HEADS, BLOCK_SIZE = 8, 16


def _variants(
    name: str, head_size: int, item: int, config: Config | None = None, shared: bool = False
) -> list[Variant]:
    words = 2 * head_size * item // 4
    chosen = config or choose(words)
    constants = {
        "HEADS": HEADS,
        "BLOCK_SIZE": BLOCK_SIZE,
        "WORDS": words,
        "STRIDE_BLOCK": HEADS * BLOCK_SIZE * words,
        "STRIDE_HEAD": BLOCK_SIZE * words,
        "STRIDE_TOKEN": words,
        "PADDED_WORDS": triton.next_power_of_2(words),
        "SHARED": shared,
    }
    found = []
    for title, kernel, more in (
        ("gather", gather_kernel, {"PADDED_HEADS": triton.next_power_of_2(HEADS)}),
        ("scatter", scatter_kernel, {}),
    ):
        fixed = {**constants, **more}
        signature = {
            argument: "*i32" if argument.endswith("_ptr") else "i32"
            for argument in kernel.arg_names
            if argument not in {*fixed, *chosen.meta}
        }
        signature["pointers_ptr"] = signature["layers_ptr"] = "*i64"
        title = f"compact {title} {name} d={head_size}" + " shared" * shared
        found.append(Variant(title, kernel, signature, fixed, chosen, default=config is None))
    return found


_DEFAULTS = (
    ("fp8", 64, 1),
    ("bf16", 64, 2),
    ("bf16", 80, 2),
    ("bf16", 128, 2),
    ("bf16", 256, 2),
    ("fp32", 256, 4),
)
VARIANTS: list[Variant] = [
    *_variants("bf16", 128, 2, shared=True),
    *(variant for default in _DEFAULTS for variant in _variants(*default)),
    *(variant for config in CONFIGS[-2:] for variant in _variants("bf16", 128, 2, config)),
]
