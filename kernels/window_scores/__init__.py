"""Importance of cache entries: attention mass they receive from the last queries."""

from .naive import Over, Reduce, window_scores

__all__ = ["Over", "Reduce", "window_scores"]
