"""Numbers hidden in a text under a name, asked for later.

The wording is that of RULER's needles (Hsieh et al. 2024, arXiv:2404.06654), whose single needles
are tasks of their own; here they serve tasks with several questions or forced answers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

HEAD = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the numbers afterwards.\n"
)
# Own lists, not a word package: samples of a seed must not change with a package's version.
ADJECTIVES = (
    *("amber", "bitter", "brave", "calm", "clever", "curious", "distant", "early", "faint"),
    *("gentle", "golden", "hollow", "humble", "icy", "lively", "modest", "narrow", "noble"),
    *("patient", "quiet", "rapid", "rusty", "silent", "steep", "sturdy", "tender", "vivid"),
)
NOUNS = (
    *("anchor", "basket", "bridge", "candle", "canyon", "carpet", "cloud", "engine", "falcon"),
    *("garden", "harbor", "hammer", "island", "jacket", "kettle", "ladder", "lantern", "meadow"),
    *("mirror", "orchard", "pencil", "river", "saddle", "temple", "tower", "tunnel", "willow"),
)


@dataclass(frozen=True)
class Needle:
    """A number and the name it is hidden under."""

    key: str
    value: str

    @property
    def sentence(self) -> str:
        """What is hidden in the text, with the space before it."""
        return f" One of the special magic numbers for {self.key} is: {self.value}."

    @property
    def question(self) -> str:
        """What is asked."""
        return f"What is the special magic number for {self.key} mentioned in the provided text?"

    @property
    def prefix(self) -> str:
        """First words of the answer, with the space before them."""
        return f" The special magic number for {self.key} mentioned in the provided text is"


def draw_needles(count: int, draw: random.Random) -> list[Needle]:
    """Needles with different names and seven-digit numbers."""
    keys = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
    values = draw.sample(range(1_000_000, 10_000_000), count)
    return [
        Needle(key, str(value)) for key, value in zip(draw.sample(keys, count), values, strict=True)
    ]
