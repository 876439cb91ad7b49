"""Policies tried by the hundred on recorded queries and keys, before any of them gets an engine."""
