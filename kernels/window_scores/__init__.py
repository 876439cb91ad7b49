"""Importance of cache entries: attention mass they receive from the last queries."""

from .naive import Reduce, window_scores

__all__ = ["Reduce", "window_scores"]
