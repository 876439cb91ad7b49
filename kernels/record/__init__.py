"""Remembers the last queries of requests."""
