"""Max-pooling of scores and the choice of the entries that stay."""

from .naive import max_pool, top_entries

__all__ = ["max_pool", "top_entries"]
