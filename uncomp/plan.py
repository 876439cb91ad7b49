"""When a request is compacted and how many blocks stay: arithmetic on lengths, no data, no engine.

These numbers are decided by the scheduler alone and may not depend on what the tokens are, so that
every rank keeps the same number of blocks without talking to the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from uncomp.config import UncompConfig
from uncomp.request import RequestSettings


@dataclass(frozen=True)
class Target:
    """The budget of one request in the units of the block pool.

    Attributes:
        settings: the request's merged settings.
        window: last queries that score.
        recent, sinks: tokens that always stay (see :class:`UncompConfig`).
        min_tokens: shorter sequences stay whole.
        recompact_every: tail growth between compactions, tokens; 0 = only one compaction.
        block_size: tokens per block.
        relocate: self-check mode, every block stays and every sub-block moves.
    """

    settings: RequestSettings
    window: int
    recent: int
    sinks: int
    min_tokens: int
    recompact_every: int
    block_size: int
    relocate: bool = False

    @classmethod
    def of(cls, settings: RequestSettings, config: UncompConfig, block_size: int) -> Target:
        return cls(
            settings,
            config.window,
            config.recent_tokens,
            config.sinks,
            config.min_tokens,
            config.recompact_every,
            block_size,
            config.relocate,
        )

    def budget_tokens(self, num_tokens: int) -> int:
        """Tokens to keep per KV head (mean) of a sequence of ``num_tokens``."""
        if self.settings.budget is not None:
            return self.settings.budget
        assert self.settings.keep is not None
        return math.ceil(self.settings.keep * num_tokens)

    def kept_blocks(self, num_tokens: int) -> int:
        """Blocks that hold survivors after compacting ``num_tokens`` computed tokens.

        The tokens after the last full block stay where they are and count towards the budget. Every
        head must be able to hold all tokens that always stay, so this is the least.
        """
        full = num_tokens // self.block_size
        if self.relocate:
            return full
        tail = num_tokens - full * self.block_size
        wanted = math.ceil((self.budget_tokens(num_tokens) - tail) / self.block_size)
        forced = self.sinks + self.recent + self.settings.protected_tokens
        return min(full, max(1, wanted, math.ceil(forced / self.block_size)))

    def worthwhile(self, num_tokens: int, held_blocks: int) -> bool:
        """Whether compacting now gives back at least one of the ``held_blocks`` full blocks."""
        if num_tokens < self.min_tokens or not self.settings.compress:
            return False
        if self.relocate:
            return num_tokens >= self.block_size
        return self.kept_blocks(num_tokens) < held_blocks

    @property
    def place(self) -> int | None:
        """Prompt tokens after which the request asks to be compacted, if that frees anything."""
        at = self.settings.compact_at
        return at if at is not None and self.worthwhile(at, at // self.block_size) else None

    def first_trigger(self, known_tokens: int, limit: int) -> int | None:
        """Length at which to compact for the first time: the end of the prefill if that frees
        anything, else the first block border at which it does; ``None`` if never below ``limit``.
        A place that the request asks for comes before both.
        """
        if not self.settings.compress:
            return None
        if self.place is not None:
            return self.place
        length = known_tokens
        while length <= limit:
            if self.worthwhile(length, length // self.block_size):
                return length
            length = (length // self.block_size + 1) * self.block_size
        return None

    def next_trigger(self, num_tokens: int) -> int | None:
        """Length at which to compact again after a compaction at ``num_tokens`` tokens.

        Never before a whole window of new tokens: the queries that scored this compaction are
        forgotten, and the next one needs as many of its own.
        """
        if self.recompact_every == 0:
            return None
        growth = max(1, self.recompact_every // self.block_size)
        border = (num_tokens // self.block_size + growth) * self.block_size
        return max(border, num_tokens + self.window)
