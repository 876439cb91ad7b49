"""Places of cache entries in vLLM's blocks, compacted or not."""

from .naive import (
    Caches,
    Holdings,
    Rows,
    gather,
    head_lengths,
    read,
    stored_sub_blocks,
    sub_blocks,
)

__all__ = [
    "Caches",
    "Holdings",
    "Rows",
    "gather",
    "head_lengths",
    "read",
    "stored_sub_blocks",
    "sub_blocks",
]
