"""Compaction on a GPU."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from uncomp.kernels.compact.kernel import gather_kernel, scatter_kernel
from uncomp.kernels.paged import Caches, Holdings, Rows
from uncomp.kernels.variant import Config

#: All but the last are defaults of some size of entry; the last is for measurements.
CONFIGS = (
    *(Config({"ENTRIES": entries}, num_warps=4) for entries in (4, 8, 16, 32, 64)),
    Config({"ENTRIES": 32}, num_warps=8),
)
TILE = 2048  # 32-bit words of a program: 4 loads of 16 bytes in flight in each of 128 threads
ALIGNMENT = 16  # bytes of the widest load


def choose(words: int) -> Config:
    """Smallest default tile of at least `TILE`, for entries of this many 32-bit words."""
    padded = triton.next_power_of_2(words)
    fitting = [c for c in CONFIGS[:-1] if c.meta["ENTRIES"] * padded >= TILE]
    return fitting[0] if fitting else CONFIGS[-2]


def scratch_bytes(caches: Caches, requests: int, blocks: int, layers: int = 1) -> int:
    """Bytes of scratch to move `layers` layers at a time.

    Args:
        requests: R, requests of a launch.
        blocks: n, columns of `kept_blocks`.
    """
    entries = blocks * caches.heads * caches.block_size
    return layers * requests * entries * (_words(caches) + 1) * 4


def compact(
    caches: Caches,
    positions: Tensor,
    rows: Rows,
    holdings: Holdings,
    chosen: Tensor,
    counts: Tensor,
    offsets: Tensor,
    kept_blocks: Tensor,
    kept_count: Tensor,
    scratch: Tensor,
    config: Config | None = None,
    begins: Tensor | None = None,
) -> None:
    """Move K, V and positions of the chosen entries; see `naive.compact` for what it does.

    Two launches for each group of layers that fits into `scratch`. Neither allocates nor waits.
    What the reference rejects is cut off here without a word: sub-blocks beyond `kept_count * H`
    are not written, and zeros are written for an entry that the head does not hold.

    Layers that share are moved one group after the other too: the lists of the first i layers must
    not be longer than what i layers have to deal, for every i, so that what is written is never
    what is still to be read; see `uncomp.importance.in_order`. Blocks that hold nothing are free of
    that. Parts of the layers have to come in order.

    Args:
        caches: strides and addresses must be multiples of 16 bytes.
        positions: contiguous.
        chosen, counts, offsets, kept_count: contiguous.
        kept_blocks: any row stride, last stride 1.
        scratch: 1-D contiguous, any dtype, overwritten; at least `scratch_bytes(caches, R, n)`
            bytes (less if K is below n * H * block_size), aligned to 16.
        config: tiling; None: `choose`.
        begins: `[L, R]` int32 contiguous, where layers share; otherwise not looked at.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit, or too small a scratch.
    """
    _check(caches, positions, rows, holdings, chosen, counts, offsets, kept_blocks, kept_count)
    requests, shared = rows.lengths.shape[0], holdings.shared
    if shared:
        _check_begins(caches, requests, begins)
    words, heads, block_size = _words(caches), caches.heads, caches.block_size
    width = chosen.shape[2]
    if not shared:
        width = min(width, kept_blocks.shape[1] * heads * block_size)
    lines = requests * width
    if lines == 0:
        return
    group = min(_scratch_words(caches, scratch) // (lines * (words + 1)), caches.layers)
    if group == 0:
        raise ValueError(
            f"compact: a scratch of {lines * (words + 1) * 4} bytes is needed for one layer of "
            f"{requests} requests with up to {width} entries, got "
            f"{scratch.numel() * scratch.element_size()}"
        )
    buffer = scratch.view(torch.uint8)[: group * lines * (words + 1) * 4].view(torch.int32)
    entries, places = buffer[: group * lines * words], buffer[group * lines * words :]
    layout = (*(rows.blocks, rows.lengths, rows.slots), holdings.counts, holdings.offsets)
    dealt = (counts, offsets, kept_count, entries, places)
    num_blocks = caches.tensors[0].shape[0]
    config = config or choose(words)
    fixed = {**_geometry(caches, config), "SHARED": shared}
    where = (caches.pointers, caches.all.pointers, kept_count if begins is None else begins)
    among = (holdings.start, caches.all.layers)
    for start in range(0, caches.layers, group):
        tiles = triton.cdiv(width, config.meta["ENTRIES"])
        grid = (tiles, requests, min(group, caches.layers - start))
        gather_kernel[grid](
            *(*where, positions, *layout, holdings.spans, chosen, *dealt),
            *(start, holdings.slots, num_blocks, rows.blocks.stride(0), chosen.shape[2], width),
            *among,
            PADDED_HEADS=triton.next_power_of_2(heads),
            **fixed,
        )
        scatter_kernel[grid](
            *(*where, positions, kept_blocks, *dealt),
            *(start, num_blocks, kept_blocks.stride(0), width, *among),
            **fixed,
        )


def _geometry(caches: Caches, config: Config) -> dict[str, int]:
    """Compile-time constants and options of both kernels."""
    words, scale = _words(caches), caches.tensors[0].element_size()
    block, head, token = (stride * scale // 4 for stride in caches.strides)
    return {
        "HEADS": caches.heads,
        "BLOCK_SIZE": caches.block_size,
        "WORDS": words,
        "STRIDE_BLOCK": block,
        "STRIDE_HEAD": head,
        "STRIDE_TOKEN": token,
        "PADDED_WORDS": triton.next_power_of_2(words),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **config.meta,
    }


def _words(caches: Caches) -> int:
    """32-bit words of an entry, K and V."""
    return 2 * caches.head_size * caches.tensors[0].element_size() // 4


def _scratch_words(caches: Caches, scratch: Tensor) -> int:
    if scratch.dim() != 1 or not scratch.is_contiguous() or scratch.data_ptr() % ALIGNMENT:
        raise ValueError(
            "compact: scratch must be 1-D, contiguous and aligned to 16 bytes, got "
            f"{list(scratch.shape)} with strides {scratch.stride()} at {scratch.data_ptr():#x}"
        )
    if scratch.device != caches.device:
        raise ValueError(f"compact: scratch must be on {caches.device}, got {scratch.device}")
    return scratch.numel() * scratch.element_size() // 4


def _check_begins(caches: Caches, requests: int, begins: Tensor | None) -> None:
    fits = begins is not None and tuple(begins.shape) == (caches.layers, requests)
    if begins is None or not fits or begins.dtype != torch.int32 or not begins.is_contiguous():
        given = None if begins is None else f"{begins.dtype} {list(begins.shape)}"
        raise ValueError(
            f"compact: layers that share need begins, int32 [{caches.layers}, {requests}], got "
            f"{given}"
        )


def _check(
    caches: Caches,
    positions: Tensor,
    rows: Rows,
    holdings: Holdings,
    chosen: Tensor,
    counts: Tensor,
    offsets: Tensor,
    kept_blocks: Tensor,
    kept_count: Tensor,
) -> None:
    layers, requests, heads = caches.layers, rows.lengths.shape[0], caches.heads
    num_blocks, slots = caches.tensors[0].shape[0], holdings.slots
    block_size = caches.block_size
    columns = -1  # any number
    for name, tensor, shape in (
        ("positions", positions, (layers, num_blocks, heads, block_size)),
        ("rows.blocks", rows.blocks, (requests, columns)),
        ("rows.lengths", rows.lengths, (requests,)),
        ("rows.slots", rows.slots, (requests,)),
        ("holdings.counts", holdings.counts, (layers, slots, heads)),
        ("holdings.offsets", holdings.offsets, (layers, slots, heads)),
        ("holdings.spans", holdings.spans, (slots, 2)),
        ("chosen", chosen, (layers, requests, columns)),
        ("counts", counts, (layers, requests, heads)),
        ("offsets", offsets, (layers, requests, heads)),
        ("kept_blocks", kept_blocks, (requests, columns)),
        ("kept_count", kept_count, (requests,)),
    ):
        fits = tensor.dim() == len(shape) and all(
            want in (columns, have) for want, have in zip(shape, tensor.shape, strict=True)
        )
        if not fits or tensor.dtype != torch.int32 or tensor.device != caches.device:
            wanted = str(list(shape)).replace("-1", "*")
            raise ValueError(
                f"compact: {name} must be int32 {wanted} on {caches.device}, got {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}"
            )
        by_row = name in ("rows.blocks", "kept_blocks")
        if tensor.stride(-1) != 1 if by_row and tensor.numel() else not tensor.is_contiguous():
            raise ValueError(
                f"compact: {name} must be contiguous{' in the last dimension' * by_row}, got "
                f"strides {tensor.stride()}"
            )
    size = caches.tensors[0].element_size()
    starts = [tensor.data_ptr() for tensor in caches.tensors]
    odd = math.gcd(*starts, *(stride * size for stride in caches.strides)) % ALIGNMENT
    if odd or 2 * caches.head_size * size % ALIGNMENT:
        raise ValueError(
            "compact: addresses, strides and entries of the caches must be multiples of "
            f"{ALIGNMENT} bytes; got strides {caches.strides} of {size} bytes, head size "
            f"{caches.head_size}, layers at {[hex(start) for start in starts]}"
        )
