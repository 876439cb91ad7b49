"""Words and sentences: worked texts, vocabularies that hide the space, placeholders."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from uncomp.spans import SENTENCE, WORD, Vocabulary, places

Token = str | tuple[str | None, str]


class Words:
    """A vocabulary of given tokens: names as the vocabulary writes them, and texts."""

    def __init__(self, *tokens: tuple[str | None, str]) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        return [self.tokens[i][0] for i in ids]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.tokens[i][1] for i in ids)


def gaps(*tokens: Token) -> list[int]:
    """Of a text that has every token of its vocabulary once."""
    given = [
        (t.replace(" ", "Ġ").replace("\n", "Ċ"), t) if isinstance(t, str) else t for t in tokens
    ]
    return Vocabulary.of(Words(*given)).gaps(range(len(given))).tolist()


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["One", " two", ".", " Three", "."], [0, 1, 0, 2, 0]),
        (["Why", "?", " So", "!", " There"], [0, 0, 2, 0, 2]),
        (["3", ".", "5", " app", "les"], [0, 0, 0, 1, 0]),
        (["a", ".", "b", " c"], [0, 0, 0, 1]),
        (["end.", " New", " one"], [0, 2, 1]),
        (['end."', " New"], [0, 1]),
        (["so", " ...", " what", "...", " now", ".", " Ok"], [0, 1, 1, 0, 1, 0, 2]),
        (["a", "\n", "b", " c"], [0, 1, 2, 1]),
        (["a", ".", "\n\n", "b"], [0, 0, 2, 2]),
        (["x", ".\n", "y"], [0, 1, 2]),
        (["什么", "。", "是", "的"], [0, 1, 2, 1]),
        (["a", "\ufffd", " b"], [0, 0, 1]),
        ([], []),
        (["one"], [0]),
        ([" one"], [0]),
        # SentencePiece: the space is in the name of a token, not in its text
        ([("▁One", "One"), (".", "."), ("▁Two", "Two"), ("<0x0A>", "\n"), ("x", "x")],
         [0, 0, 2, 1, 2]),
        # a reserved id that is no token
        ([("a", "a"), (".", "."), (None, ""), ("Ġb", " b")], [0, 0, 0, 1]),
    ],
    ids=str,
)  # fmt: skip
def test_what_tokens_begin(tokens: list[Token], expected: list[int]) -> None:
    assert gaps(*tokens) == expected


def test_unknown_ids_begin_and_end_nothing() -> None:
    found = Vocabulary.of(Words(("a", "a"), (".", "."), ("Ġb", " b")))
    assert found.gaps([1, -1, 2]).tolist() == [0, 0, WORD]
    assert found.gaps([1, 77, 2, 1, 2]).tolist() == [0, 0, WORD, 0, SENTENCE]
    assert found.gaps([0, 1, 2]).dtype == np.uint8


def test_places_add_up() -> None:
    told = bytes([0, 1, 0, 2, 0, 1])
    steps = [1, 16, 1, 16384, 1, 16, 1, 1]
    sums = [sum(steps[: i + 1]) for i in range(8)]
    assert places(told, 8).tolist() == sums
    assert places(told, 3).tolist() == sums[:3]
    assert places(b"", 3).tolist() == [1, 2, 3]


def test_a_real_vocabulary(demo_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    text = "The pass is 9.5 km long. It opens in May!\nBring 2 ropes, e.g. thin ones.\n\n- Tent"
    ids = tokenizer.encode(text)
    found = Vocabulary.of(tokenizer).gaps(ids)

    def parts(least: int) -> list[str]:
        at = [0, *np.flatnonzero(found >= least).tolist(), len(ids)]
        cut = [tokenizer.decode(ids[a:b]) for a, b in pairwise(at)]
        assert "".join(cut) == text
        return [part.strip() for part in cut if part.strip()]

    assert parts(SENTENCE) == [
        "The pass is 9.5 km long.",
        "It opens in May!",
        "Bring 2 ropes, e.g.",  # an abbreviation looks like an end
        "thin ones.",
        "- Tent",
    ]
    assert parts(WORD) == text.split()
