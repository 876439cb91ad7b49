"""What is compiled in the absence of a GPU (`uncomp.kernels.compile`)."""

from __future__ import annotations

from uncomp.kernels.variant import Config, Variant

from .kernel import choose_kernel, ema_kernel, limits_kernel, places_kernel, pool_kernel
from .launch import CONFIGS, POOL_CONFIGS, ema_constants

_HELD = dict.fromkeys(
    ("lengths_ptr", "slots_ptr", "counts_ptr", "offsets_ptr", "spans_ptr"), "*i32"
)
_TERMS = {
    **_HELD,
    **dict.fromkeys(("blocks_ptr", "positions_ptr", "full_ptr", "protect_ptr"), "*i32"),
    **dict.fromkeys(
        (
            *("num_rows", "num_slots", "num_blocks", "stride_row", "num_spans", "first_layer"),
            *("sinks", "window"),
        ),
        "i32",
    ),
}
_NOT_OF_PLACES = ("full_ptr", "protect_ptr", "num_spans", "sinks", "window")
_SCORES = {"raw_ptr": "*fp32", "entries": "i32"}


def _constants(heads: int, block_size: int) -> dict[str, int]:
    return {"HEADS": heads, "BLOCK_SIZE": block_size}


def _limits(config: Config, heads: int = 8, block_size: int = 16, shared: bool = False) -> Variant:
    signature = {**_TERMS, "eligible_ptr": "*i32", "forced_ptr": "*i32"}
    name = f"limits H={heads} bs={block_size}" + " shared" * shared
    default = config == CONFIGS[0]
    constants = {**_constants(heads, block_size), "SHARED": shared}
    return Variant(name, limits_kernel, signature, constants, config, default)


_POOLED = {
    **_HELD,
    **_SCORES,
    "out_ptr": "*fp32",
    **dict.fromkeys(("num_rows", "num_slots", "window"), "i32"),
}


def _pool(width: int) -> Variant:
    constants = {**_constants(8, 16), "WIDTH": width}
    return Variant(f"pool width={width}", pool_kernel, _POOLED, constants, POOL_CONFIGS[0])


def _ema(length: int, by_place: bool = False) -> Variant:
    constants = {**_constants(8, 16), **ema_constants(length, by_place)}
    name = f"ema length={length}" + " by place" * by_place
    signature = {**_POOLED, "places_ptr": "*i32"}
    return Variant(name, ema_kernel, signature, constants, POOL_CONFIGS[0])


def _places(shared: bool) -> Variant:
    terms = {k: v for k, v in _TERMS.items() if k not in _NOT_OF_PLACES}
    signature = {**terms, "places_ptr": "*i32", "out_ptr": "*i32", "entries": "i32", "width": "i32"}
    constants = {**_constants(8, 16), "SHARED": shared}
    return Variant(
        "places" + " shared" * shared, places_kernel, signature, constants, POOL_CONFIGS[0]
    )


def _choose(config: Config, heads: int = 8, block_size: int = 16, shared: bool = False) -> Variant:
    return Variant(
        f"choose H={heads} bs={block_size}" + " shared" * shared,
        choose_kernel,
        {
            **_TERMS, **_SCORES, "pooled_ptr": "*fp32", "chosen_ptr": "*i32", "kept_ptr": "*i32",
            "starts_ptr": "*i32", "width": "i32",
        },
        {**_constants(heads, block_size), "SHARED": shared},
        config,
        config == CONFIGS[0],
    )  # fmt: skip


VARIANTS: list[Variant] = [
    _limits(CONFIGS[0]),
    _limits(CONFIGS[0], heads=5, block_size=64),
    _limits(CONFIGS[0], shared=True),
    _choose(CONFIGS[0], shared=True),
    _pool(1),
    _pool(7),
    _ema(16),
    _ema(4, by_place=True),
    _places(False),
    _places(True),
    *(_choose(config) for config in CONFIGS),
    _choose(CONFIGS[0], heads=5, block_size=64),
]
