"""Prompts: chat template, earlier turns, and what is cut."""

from __future__ import annotations

from typing import Any

import pytest

from uncomp.eval.run.prompts import Renderer
from uncomp.eval.tasks.base import Sample, Turn


class Words:
    """A tokenizer of single characters with a chat template."""

    chat_template = "yes"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(c) for c in text]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(map(chr, token_ids))

    def apply_chat_template(self, messages: list[dict[str, str]], **kwargs: Any) -> str:
        assert kwargs == {"tokenize": False, "add_generation_prompt": True}
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def sample(**changes: Any) -> Sample:
    given: dict[str, Any] = {
        "task": "t",
        "id": "1",
        "metric": "f1",
        "head": "Read: ",
        "context": "0123456789",
        "turns": (
            Turn(" Who?", ("me", "I"), max_tokens=5, prefix=" It is"),
            Turn(" Why?", ("so",), max_tokens=5),
        ),
    }
    return Sample(**{**given, **changes})


def text(window: int, turn: int = 0, chat: bool = True, **changes: Any) -> tuple[str, int]:
    prompt = Renderer(Words(), window, chat).prompt(sample(**changes), turn)
    return Words().decode(list(prompt.ids)), prompt.cut


def test_chat_template_with_the_answer_begun() -> None:
    assert text(100) == ("<user>Read: 0123456789 Who?<assistant>It is", 0)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("turn", [0, 1])
def test_end_of_the_context(chat: bool, turn: int) -> None:
    prompt = Renderer(Words(), 100, chat).prompt(sample(), turn)
    before = "<user>Read: 0123456789" if chat else "\x01Read: 0123456789"
    assert Words().decode(list(prompt.ids[: prompt.context_end])) == before
    cut = Renderer(Words(), len(prompt.ids), chat).prompt(sample(), turn)
    assert (cut.cut, cut.context_end) == (5, prompt.context_end - 5)


def test_a_token_of_context_and_question_belongs_to_the_question() -> None:
    class Pairs(Words):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[str]:  # type: ignore[override]
            return [text[i : i + 2] for i in range(0, len(text), 2)]

    odd = sample(context="012345678", chat=False)
    prompt = Renderer(Pairs(), 100, chat=False).prompt(odd, 0)
    assert "".join(prompt.ids[: prompt.context_end]) == "Read: 01234567"  # type: ignore[arg-type]


def test_later_turns_see_earlier_ones_with_their_reference() -> None:
    expected = "<system>Be brief.<user>Read: 0123456789 Who?<assistant>It is me<user> Why?"
    assert text(200, turn=1, system="Be brief.") == (expected + "<assistant>", 0)


def test_plain_text_with_the_tokenizers_own_first_token() -> None:
    assert text(100, chat=False) == ("\x01Read: 0123456789 Who? It is", 0)
    expected = "\x01Read: 0123456789 Who? It is me\n\n Why?"
    assert text(100, turn=1, chat=False) == (expected, 0)


def test_a_sample_can_insist() -> None:
    renderer = Renderer(Words(), 100, chat=True)
    assert renderer.prompt(sample(chat=False), 0).ids[0] == 1
    assert not renderer.uses_chat(sample(chat=False))
    assert Renderer(Words(), 100, chat=False).uses_chat(sample(chat=True))


@pytest.mark.parametrize(
    ("over", "left"), [(1, "012346789"), (2, "01236789"), (3, "0123789"), (9, "0"), (10, "")]
)
def test_the_middle_of_the_context_is_cut(over: int, left: str) -> None:
    whole = "<user>Read: 0123456789 Who?<assistant>It is"
    window = len(whole) - over + 5  # max_tokens
    if left:
        assert text(window) == (whole.replace("0123456789", left), over)
    else:
        with pytest.raises(ValueError, match="even without context"):
            text(window)


def test_decoding_may_take_a_token_more() -> None:
    """Text cut at the seam can be longer in tokens than its halves: the prompt still fits."""

    class Seam(Words):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            # A context with a hole costs three tokens more.
            hole = "0123456789" not in text and "Read" in text
            return super().encode(text, add_special_tokens) + [7] * (3 * hole)

    whole = len(Renderer(Words(), 100, True).prompt(sample(), 0).ids)
    prompt = Renderer(Seam(), whole - 2 + 5, True).prompt(sample(), 0)
    assert len(prompt.ids) == whole - 2
    assert prompt.cut == 2 + 3


def test_forced_text_takes_its_own_room() -> None:
    turns = (Turn("", forced="abc", max_tokens=50),)
    prompt = Renderer(Words(), 20, False).prompt(sample(turns=turns, chat=False), 0)
    assert prompt.forced == tuple(map(ord, "abc"))
    assert prompt.cut == 0
    assert len(prompt.ids) == 17


def test_a_system_message_needs_a_template() -> None:
    with pytest.raises(ValueError, match="a system message needs a chat template"):
        text(100, chat=False, system="Be brief.")


def test_no_template_is_said_at_once() -> None:
    tokenizer = Words()
    tokenizer.chat_template = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="--no-chat"):
        Renderer(tokenizer, 100, True)
