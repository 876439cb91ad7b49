"""A tokenizer of single characters, for tests in which lengths should be obvious."""

from __future__ import annotations


class Letters:
    """One token a character, no chat template."""

    chat_template = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(map(chr, token_ids))
