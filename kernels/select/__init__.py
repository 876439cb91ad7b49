"""Pooling of scores and the choice of the entries that stay."""

from .naive import (
    BREAK,
    POOLINGS,
    TOKENS_A_WORD,
    UNIT,
    Pooling,
    ema_pool,
    max_pool,
    pool_scores,
    reach,
    top_entries,
)

__all__ = [
    "BREAK",
    "POOLINGS",
    "TOKENS_A_WORD",
    "UNIT",
    "Pooling",
    "ema_pool",
    "max_pool",
    "pool_scores",
    "reach",
    "top_entries",
]
