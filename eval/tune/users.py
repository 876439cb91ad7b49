"""How many users fit into a KV pool: arithmetic on whole blocks.

With ``B`` usable blocks (one of vLLM's is never given out), ``F = ceil(L / block_size)`` blocks for
a user of ``L`` tokens with the full cache, and ``C`` blocks for the same user after a compaction::

    full cache:   B // F
    compressed:   1 + (B - F) // C      (0 if B < F)

A prompt needs its full size while it is computed, so the last user to come must find ``F`` free
blocks; it gives ``F - C`` back when its prefill ends. ``C`` is what
:meth:`uncomp.plan.Target.kept_blocks` keeps, and one more for the last block if that is not full.
While they answer, users grow by up to ``recompact_every`` tokens between compactions, as users of
the full cache do without end; neither is counted: ``L`` is the length at which they are counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from uncomp.config import UncompConfig
from uncomp.plan import Target
from uncomp.request import RequestSettings


@dataclass(frozen=True)
class Pool:
    """A pool of KV blocks.

    Attributes:
        blocks: that can be given out.
        block_size: tokens per block.
    """

    blocks: int
    block_size: int

    @classmethod
    def of_memory(cls, memory: int, token_bytes: int, block_size: int) -> Pool:
        """The pool that ``memory`` bytes make; ``token_bytes``: K and V of all layers and heads."""
        return cls(max(0, memory // (token_bytes * block_size) - 1), block_size)

    def full_blocks(self, tokens: int) -> int:
        """Blocks of a user with the full cache."""
        return -(-tokens // self.block_size)

    def kept_blocks(self, tokens: int, config: UncompConfig) -> int:
        """Blocks of a user just after a compaction at ``tokens`` tokens."""
        full, tail = divmod(tokens, self.block_size)
        request = RequestSettings(config.keep != 1.0, config.keep, config.budget)
        target = Target.of(request, config, self.block_size)
        if not target.worthwhile(tokens, full):
            return self.full_blocks(tokens)
        return target.kept_blocks(tokens) + (tail > 0)

    def users(self, tokens: int, config: UncompConfig | None = None) -> int:
        """Users of ``tokens`` tokens each that fit together; ``config`` None: the full cache."""
        full = self.full_blocks(tokens)
        if config is None:
            return self.blocks // full
        if self.blocks < full:
            return 0
        return 1 + (self.blocks - full) // self.kept_blocks(tokens, config)


_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}B": 1000**i for i, p in enumerate(("K", "M", "G", "T"), 1)}
_UNITS |= {f"{p}IB": 1024**i for i, p in enumerate(("K", "M", "G", "T"), 1)}


def parse_bytes(text: str) -> int:
    """``40GiB`` or ``8e9`` as bytes.

    Raises:
        ValueError: not a number with one of the units B, KB, MB, GB, TB, KiB, MiB, GiB, TiB.
    """
    number = text.strip()
    unit = ""
    while number and number[-1].isalpha():
        number, unit = number[:-1], number[-1] + unit
    try:
        value = float(number) * _UNITS[unit.upper()]
    except (ValueError, KeyError):
        value = 0.0
    if not 1 <= value < float("inf"):
        raise ValueError(f"{text!r}: must be bytes such as 8000000000, 8GB or 40GiB")
    return int(value)
