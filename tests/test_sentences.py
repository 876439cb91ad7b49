"""Where sentences begin: worked texts, vocabularies that hide the space, placeholders."""

from __future__ import annotations

import numpy as np
import pytest

from uncomp.sentences import Sentences


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


def starts(*tokens: str | tuple[str | None, str]) -> list[int]:
    """Of a text that has every token of its vocabulary once."""
    given = [
        (t.replace(" ", "Ġ").replace("\n", "Ċ"), t) if isinstance(t, str) else t for t in tokens
    ]
    return Sentences.of(Words(*given)).starts(range(len(given))).tolist()


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["One", " two", ".", " Three", "."], [3]),
        (["Why", "?", " So", "!", " There"], [2, 4]),
        (["3", ".", "5", " apples"], []),
        (["a", ".", "b", " c"], []),
        (["end.", " New", " one"], [1]),
        (['end."', " New"], []),
        (["so", " ...", " what", "...", " now", ".", " Ok"], [6]),
        (["a", "\n", "b", " c"], [2]),
        (["a", ".", "\n\n", "b"], [2, 3]),
        (["x", ".\n", "y"], [2]),
        (["什么", "。", "是"], [2]),
        ([], []),
        (["one"], []),
        # SentencePiece: the space is in the name of a token, not in its text
        ([("▁One", "One"), (".", "."), ("▁Two", "Two"), ("<0x0A>", "\n"), ("x", "x")], [2, 4]),
        # a reserved id that is no token
        ([("a", "a"), (".", "."), (None, ""), ("Ġb", " b")], []),
    ],
    ids=lambda value: "-".join(map(str, value)) if value and isinstance(value[0], int) else None,
)
def test_a_sentence_begins(tokens: list[str], expected: list[int]) -> None:
    assert starts(*tokens) == expected


def test_unknown_ids_begin_and_end_nothing() -> None:
    found = Sentences.of(Words(("a", "a"), (".", "."), ("Ġb", " b")))
    assert found.starts([1, -1, 2]).tolist() == []
    assert found.starts([1, 77, 2, 1, 2]).tolist() == [4]
    assert found.starts([0, 1, 2]).dtype == np.int32


def test_a_real_vocabulary(demo_model) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    text = "The pass is 9.5 km long. It opens in May!\nBring 2 ropes, e.g. thin ones.\n\n- Tent"
    ids = tokenizer.encode(text)
    at = [*Sentences.of(tokenizer).starts(ids).tolist(), len(ids)]
    parts = [tokenizer.decode(ids[a:b]) for a, b in zip([0, *at], at, strict=False)]
    assert "".join(parts) == text
    assert [part.strip() for part in parts if part.strip()] == [
        "The pass is 9.5 km long.",
        "It opens in May!",
        "Bring 2 ropes, e.g.",  # an abbreviation looks like an end
        "thin ones.",
        "- Tent",
    ]
