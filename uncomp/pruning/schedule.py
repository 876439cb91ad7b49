"""How many tokens of a prompt enter the layers of every stage: arithmetic on lengths, no data.

Source: UNComp (arXiv 2410.03090), hidden-state compression. The published code counts down from a
constant of the model; here counts are fractions of the prompt, whose length it may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Where tokens leave.

    Attributes:
        starts: first layer of every stage after the first, ascending, at least 1: the first layer
            reads the whole prompt, and its attention chooses.
        layers: of the model.
        floor: no stage reads fewer tokens, so that short prompts are left alone.
    """

    starts: tuple[int, ...]
    layers: int
    floor: int = 0

    def __post_init__(self) -> None:
        ascending = list(self.starts) == sorted(set(self.starts))
        if not ascending or not all(1 <= start < self.layers for start in self.starts):
            raise ValueError(
                f"stages must start at different layers of 1..{self.layers - 1}, ascending, got "
                f"{list(self.starts)}"
            )

    def fraction(self, stage: int, keep: float) -> float:
        """Share of the prompt that enters a stage: from 1 in equal steps to `keep` in the last.

        With five stages and keep 0.375 the published 4096, 3456, 2816, 2176, 1536 of 4096.
        """
        return 1 - (1 - keep) * stage / len(self.starts) if self.starts else 1.0

    def kept(self, tokens: int, keep: float, block_size: int, forced: int) -> tuple[int, ...]:
        """Tokens that enter every stage after the first.

        What is dropped is a whole number of blocks: a stage's tokens then lie at the end of the
        request's blocks, like any other part of the cache that was kept.

        Args:
            tokens: of the prompt.
            keep: fraction that enters the last stage, in (0, 1].
            block_size: tokens per block.
            forced: tokens that always stay.
        """
        if not 0 < keep <= 1:
            raise ValueError(f"keep={keep}: must be in (0, 1]")
        counts = []
        for stage in range(1, len(self.starts) + 1):
            wanted = max(self.floor, forced, round(tokens * self.fraction(stage, keep)))
            counts.append(tokens - max(0, tokens - wanted) // block_size * block_size)
        return tuple(counts)

    def token_layers(self, tokens: int, counts: Sequence[int]) -> int:
        """Tokens times layers that are computed, of `tokens * layers` without pruning."""
        ends = [*self.starts, self.layers]
        sizes = [end - start for start, end in zip([0, *self.starts], ends, strict=True)]
        return sum(size * n for size, n in zip(sizes, [tokens, *counts], strict=True))


def always_read(sinks: int, window: int, block_size: int, protected: int = 0) -> int:
    """Tokens of a prompt that enter every layer: its first ones, its last ones, protected spans.

    The last ones are a block at least: what is dropped lies in front of the block being filled.
    """
    return sinks + max(window, block_size) + protected


def parse_layers(text: str) -> tuple[int, ...]:
    """Layers given as text: ``"2,15,26,31"``.

    Raises:
        ValueError: not numbers.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"{text!r}: must be the first layers of the later stages, such as '2,15,26,31'"
        ) from None
