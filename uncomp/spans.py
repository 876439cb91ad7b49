"""Words and sentences in a sequence of token ids.

How many tokens a number, a name or a UUID has depends on the tokenizer, and one without its end is
worth nothing; and what the last queries look for in a sentence is said in that sentence, hardly
ever in the next one. So scores are handed on from word to word, inside their sentence
(`uncomp.kernels.select.ema_pool`). Both are found from the tokens' texts alone, looked at once per
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from uncomp.kernels.select import BREAK, UNIT

#: what a token begins, beside being the next one
WORD, SENTENCE = 1, 2

#: what a sentence ends with, if white space or a new line follows
_ENDS = (".", "!", "?")
#: the same in scripts that put no space after it
_FULL_STOPS = ("\u3002", "\uff01", "\uff1f")
#: first character of the scripts (Chinese, Japanese) that put no spaces between words
_NO_SPACES, _UNKNOWN = "\u2e80", "\ufffd"
#: how vocabularies write a leading space (byte-level BPE, SentencePiece) and a new line
_SPACES = ("Ġ", "▁", " ")
_NEW_LINES = ("Ċ", "<0x0A>", "\n")

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Vocabulary:
    """What the tokens of a vocabulary say about words and sentences.

    Attributes:
        words: `[V]` bool, the token begins a word.
        spaces: `[V]` bool, the token begins with white space.
        ends: `[V]` bool, the token ends with a full stop or the like.
        breaks: `[V]` bool, what follows the token is a new sentence in any case: it has a new line.
    """

    words: Flags
    spaces: Flags
    ends: Flags
    breaks: Flags

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """Look at every token once (a second for 150,000 tokens).

        Args:
            tokenizer: has ``len``, ``convert_ids_to_tokens`` and ``decode``, as those of Hugging
                Face and of vLLM.
        """
        ids = list(range(len(tokenizer)))
        # A token's own text may lack the space before it, its name has it; ids without a token
        # have neither.
        names = [name or "" for name in tokenizer.convert_ids_to_tokens(ids)]
        texts = [tokenizer.decode([i]) if name else "" for i, name in enumerate(names)]
        pairs = list(zip(names, texts, strict=True))
        spaces = _flags(name.startswith(_SPACES) or text[:1].isspace() for name, text in pairs)
        alone = _flags(_NO_SPACES <= text[:1] != _UNKNOWN for text in texts)
        broken = _flags("\n" in t or any(mark in n for mark in _NEW_LINES) for n, t in pairs)
        stops = _flags(text.endswith(_FULL_STOPS) for text in texts)
        ends = _flags(_ends(text.rstrip()) for text in texts)
        return cls(spaces | alone, spaces | broken, ends, broken | stops)

    def gaps(self, ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """What every token begins.

        Args:
            ids: token ids; those outside the vocabulary (placeholders) begin and end nothing.

        Returns:
            `[N]`: 0 (it goes on with a word), `WORD` or `SENTENCE`; 0 for the first.
        """
        tokens = np.asarray(ids, dtype=np.int64)
        known = (tokens >= 0) & (tokens < len(self.ends))
        tokens = np.where(known, tokens, 0)
        found = np.zeros(len(tokens), dtype=np.uint8)
        found[(self.words[tokens] | self.breaks[tokens]) & known] = WORD
        after_end = (self.ends[tokens] & known)[:-1] & (self.spaces[tokens] & known)[1:]
        found[1:][(self.breaks[tokens] & known)[:-1] | after_end] = SENTENCE
        found[:1] = 0
        return found


def places(gaps: bytes, tokens: int) -> npt.NDArray[np.int32]:
    """Where every token stands, for scores that are handed on: see `ema_pool`.

    Args:
        gaps: of `Vocabulary.gaps`, as bytes; tokens beyond them begin nothing.

    Returns:
        `[tokens]`: 1 more from token to token of a word, `UNIT` from word to word, `BREAK` from
        sentence to sentence.
    """
    steps = np.ones(tokens, dtype=np.int32)
    given = np.frombuffer(gaps, dtype=np.uint8)[:tokens]
    steps[: len(given)] = np.array([1, UNIT, BREAK], dtype=np.int32)[given]
    return steps.cumsum(dtype=np.int32)


def _ends(text: str) -> bool:
    """Dots in a row leave something out: they end nothing."""
    return text.endswith(_ENDS) and not text.endswith("..")


def _flags(values: Iterable[bool]) -> Flags:
    return np.fromiter(values, dtype=np.bool_)
