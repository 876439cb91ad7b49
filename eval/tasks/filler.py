"""Running text of a wanted number of tokens, and how many tokens are left for it."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate

from uncomp.eval.tasks.base import DataFile, Tokenizer, Turn, Wanted
from uncomp.eval.tasks.fitting import TooShortError
from uncomp.eval.tasks.sources import package_json

#: Tokens left free for the chat template: the roles, and the system text some templates add.
TEMPLATE_TOKENS = 80
#: Tokens left free for the roles of each further turn.
TURN_TOKENS = 16
#: Tokens left free without a chat template: what a tokenizer puts first, and joints.
RAW_TOKENS = 8
# A sentence keeps the white space before it: tokenizers put it in the following token, so the
# tokens of the sentences add up to the tokens of the text.
_SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s)")


def tokens_of(tokenizer: Tokenizer, *texts: str) -> int:
    """Tokens of the texts, each on its own, without special tokens."""
    return sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)


def draw_for(task: str, wanted: Wanted, index: int) -> random.Random:
    """Random numbers of one sample: the same for every count and length of the same seed."""
    return random.Random(f"{task}/{wanted.seed}/{index}")


def turn_tokens(tokenizer: Tokenizer, turns: Sequence[Turn]) -> int:
    """Tokens that a conversation has beyond its document when the last turn has been answered.

    Earlier turns count with their first reference, the last one with what it may generate or is
    forced to say.
    """
    total = 0
    for i, turn in enumerate(turns):
        total += tokens_of(tokenizer, turn.question, turn.prefix)
        if i + 1 < len(turns):
            total += tokens_of(tokenizer, turn.references[0])
        else:
            total += tokens_of(tokenizer, turn.forced) if turn.forced else turn.max_tokens
    return total


def room(
    task: str,
    wanted: Wanted,
    turns: Sequence[Turn],
    *texts: str,
    chat: bool = True,
    least: int = 256,
) -> int:
    """Tokens that running text may have.

    Args:
        task: name, for the error.
        wanted: what is asked for.
        turns: of the sample.
        texts: everything else that the prompt has: head, system message, inserted sentences.
        chat: whether to leave tokens for a chat template.
        least: tokens of running text without which the task makes no sense.

    Raises:
        TooShortError: if fewer than ``least`` are left; says which length would do.
    """
    reserve = TEMPLATE_TOKENS + TURN_TOKENS * (len(turns) - 1) if chat else RAW_TOKENS
    used = turn_tokens(wanted.tokenizer, turns) + tokens_of(wanted.tokenizer, *texts) + reserve
    if wanted.length - used < least:
        raise TooShortError(task, wanted.length, used + least)
    return wanted.length - used


@dataclass(frozen=True)
class Passage:
    """Consecutive sentences.

    Attributes:
        sentences: each with the white space before it.
        tokens: of each sentence.
        seam: number of the sentence that is the first of the whole text and follows its last, or
            None.
    """

    sentences: tuple[str, ...]
    tokens: tuple[int, ...]
    seam: int | None = None

    @property
    def text(self) -> str:
        """The sentences as one text, without white space at its start."""
        return "".join(self.sentences).lstrip()

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(self.tokens)]

    def tokens_after(self, boundary: int) -> int:
        """Tokens from a sentence to the end."""
        return self._starts[-1] - self._starts[boundary]

    def boundary(self, depth: float) -> int:
        """Number of the sentence that starts nearest to ``depth`` (0: start, 1: end)."""
        at = depth * self._starts[-1]
        return min(range(len(self._starts)), key=lambda i: abs(self._starts[i] - at))

    def depth(self, boundary: int) -> float:
        """Share of the passage's tokens before a sentence, rounded to 4 digits."""
        return round(self._starts[boundary] / self._starts[-1], 4)

    def insert(self, inserts: Iterable[tuple[float, str]]) -> tuple[str, list[float]]:
        """The passage with texts put between its sentences.

        Args:
            inserts: (wanted depth, text) each.

        Returns:
            The text, and the depth of each insert as a share of the passage's tokens.
        """
        places = [(self.boundary(depth), text) for depth, text in inserts]
        before: dict[int, str] = {}
        for place, text in places:
            before[place] = before.get(place, "") + text
        parts = [before.get(i, "") + sentence for i, sentence in enumerate(self.sentences)]
        parts.append(before.get(len(self.sentences), ""))
        return "".join(parts).lstrip(), [self.depth(place) for place, _ in places]


class RunningText:
    """A long text from which passages are taken.

    Args:
        text: the whole text.
        tokenizer: counts the tokens.
    """

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        # The first sentence may follow the last, so it has white space before it as well.
        self._sentences = _SENTENCE_END.split(f" {text.strip()}")
        self._tokenizer = tokenizer
        self._counted: dict[int, int] = {}

    def passage(self, tokens: int, draw: random.Random) -> Passage:
        """Sentences from a random start, as many as fit into ``tokens``.

        Raises:
            ValueError: if the whole text has fewer tokens: nothing is repeated, since repeated
                text can be dropped from a cache at no loss.
        """
        # A start too near the end is followed by the text's beginning, so that every start has
        # the same chance and texts hardly longer than the passage do as well.
        first = draw.randrange(len(self._sentences))
        chosen: list[int] = []
        used = 0
        for step in range(len(self._sentences)):
            i = (first + step) % len(self._sentences)
            used += self._count(i)
            if used > tokens:
                break
            chosen.append(i)
        else:
            raise ValueError(f"{tokens} tokens wanted, but the whole text has {used}: ask for less")
        return Passage(
            tuple(self._sentences[i] for i in chosen),
            tuple(self._counted[i] for i in chosen),
            chosen.index(0) if 0 in chosen[1:] else None,
        )

    def _count(self, i: int) -> int:
        if i not in self._counted:
            self._counted[i] = tokens_of(self._tokenizer, self._sentences[i])
        return self._counted[i]


def essays() -> tuple[str, DataFile]:
    """Paul Graham's essays, the usual text around needles, from the package that has RULER's data.

    About 3 million characters (some 700,000 tokens), and not what ``uncomp calibrate`` uses by
    default.

    Raises:
        DataError: if the package is not installed.
    """
    content, file = package_json("long_context_eval", "data/synthetic/json/PaulGrahamEssays.json")
    return _unwrapped(content["text"]), file


@cache
def _unwrapped(text: str) -> str:
    """Lines of a web page joined, and a space after a sentence that a paragraph's end had lost."""
    joined = re.sub(r"\s+", " ", text)
    return re.sub(r"(?<=[a-z][.!?])(?=[A-Z][a-z]*\W)", " ", joined)
