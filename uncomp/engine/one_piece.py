"""The caches of all layers as one, where vLLM has them in one piece of memory.

Sub-blocks are then numbered through all layers, and a layer's entries can lie in another layer's
place: that is how layers share one budget although vLLM frees a block for all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def in_one_piece(caches: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """The caches of all layers as one tensor, and where each layer begins in it.

    Args:
        caches: a layer each, `[num_blocks, heads, block_size, width]`, contiguous and alike.

    Returns:
        `[n, heads, block_size, width]` that shares their memory, and `[layers]` int64, the first
        block of every layer; ``None`` if they do not lie in one piece, a whole number of blocks
        apart. Blocks between them belong to nobody.
    """
    first = caches[0]
    page = first[0].numel()
    storage = first.untyped_storage()
    for cache in caches:
        is_alike = cache.shape == first.shape and cache.dtype == first.dtype
        is_inside = cache.untyped_storage().data_ptr() == storage.data_ptr()
        if not (is_alike and is_inside and cache.is_contiguous()):
            return None
    offsets = torch.tensor([cache.storage_offset() for cache in caches])
    start = int(offsets.min())
    offsets -= start
    if bool((offsets % page).any()):
        return None
    bases = offsets // page
    blocks = int(bases.max()) + first.shape[0]
    joined = first.as_strided((blocks, *first.shape[1:]), first.stride(), start)
    return joined, bases
