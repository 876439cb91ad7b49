"""Where sentences and lines begin in a sequence of token ids.

What the last queries look for in a sentence is said in that sentence, and hardly ever in the next
one; so scores are not handed on across its end (`uncomp.kernels.select.sentence_pool`). Found from
the tokens' texts alone, once per vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

#: what a sentence ends with, if white space or a new line follows
_ENDS = (".", "!", "?")
#: the same in scripts that put no space after it
_FULL_STOPS = ("\u3002", "\uff01", "\uff1f")
#: how vocabularies write a leading space (byte-level BPE, SentencePiece) and a new line
_SPACES = ("Ġ", "▁", " ")
_NEW_LINES = ("Ċ", "<0x0A>", "\n")

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Sentences:
    """What the tokens of a vocabulary say about where sentences begin.

    Attributes:
        ends: `[V]` bool, the token ends with a full stop or the like.
        spaces: `[V]` bool, the token begins with white space.
        breaks: `[V]` bool, what follows the token is a new sentence in any case: it has a new line.
    """

    ends: Flags
    spaces: Flags
    breaks: Flags

    @classmethod
    def of(cls, tokenizer: Any) -> Sentences:
        """Look at every token of a vocabulary once (a second for 150,000 tokens).

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
        return cls(
            ends=_flags(_ends(text.rstrip()) for _, text in pairs),
            spaces=_flags(name.startswith(_SPACES) or text[:1].isspace() for name, text in pairs),
            breaks=_flags(
                "\n" in text or any(mark in name for mark in _NEW_LINES)
                or text.endswith(_FULL_STOPS)
                for name, text in pairs
            ),
        )  # fmt: skip

    def starts(self, ids: Sequence[int]) -> npt.NDArray[np.int32]:
        """Positions of the tokens that begin a new sentence or line, ascending, without the first.

        Args:
            ids: token ids; those outside the vocabulary (placeholders) begin and end nothing.
        """
        tokens = np.asarray(ids, dtype=np.int64)
        known = (tokens >= 0) & (tokens < len(self.ends))
        tokens = np.where(known, tokens, 0)
        ended = self.ends[tokens] & known
        follows = (self.spaces | self.breaks)[tokens] & known
        found = (self.breaks[tokens] & known)[:-1] | (ended[:-1] & follows[1:])
        return (np.flatnonzero(found) + 1).astype(np.int32)


def _ends(text: str) -> bool:
    """Dots in a row leave something out: they end nothing."""
    return text.endswith(_ENDS) and not text.endswith("..")


def _flags(values: Any) -> Flags:
    return np.fromiter(values, dtype=np.bool_)
