"""Log-probabilities as an engine gives them, as records."""

from __future__ import annotations

from collections.abc import Mapping

from uncomp.eval.tasks.teacher_forcing import TokenRecord


def token_record(token: int, logprobs: Mapping[int, float], top: int) -> TokenRecord:
    """One forced token and the ``top`` best beside it; engines add the forced one to their list."""
    best = sorted(logprobs.items(), key=lambda item: -item[1])[:top]
    return TokenRecord(
        logprobs[token], tuple(t for t, _ in best), tuple(value for _, value in best)
    )
