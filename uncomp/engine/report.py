"""What one request's compactions left of its cache, for the request's own answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from uncomp.engine.orders import Order, Receipt


@dataclass
class Report:
    """Sums over layers and KV heads of the rank that answers the scheduler.

    Attributes:
        compactions: how many have been run.
        tokens: length of the sequence at the last one.
        full_tokens: cached tokens that the full cache would have held then.
        kept_tokens: cached tokens after it.
        heads: KV heads of all layers.
        prefill_keep: part of the prompt that was read, over all layers.
    """

    compactions: int = 0
    tokens: int = 0
    full_tokens: int = 0
    kept_tokens: int = 0
    heads: int = 0
    prefill_keep: float = 1.0

    def add(self, order: Order, receipt: Receipt) -> None:
        """Take in one finished compaction, in order."""
        if self.compactions == 0:
            self.heads = receipt.heads
        self.compactions += 1
        self.tokens = order.num_tokens
        self.full_tokens = order.num_tokens * self.heads
        self.kept_tokens = receipt.tokens_kept

    def facts(self) -> dict[str, Any]:
        """JSON-ready. ``keep`` is kept over full KV bytes at the last compaction (1: none ran).

        Every cached token has the same bytes, so the ratio of tokens is that of bytes.
        """
        pruned = {"prefill_keep": self.prefill_keep} if self.prefill_keep < 1 else {}
        return {
            **pruned,
            "compactions": self.compactions,
            "tokens": self.tokens,
            "full_tokens": self.full_tokens,
            "kept_tokens": self.kept_tokens,
            "keep": self.kept_tokens / self.full_tokens if self.full_tokens else 1.0,
        }
