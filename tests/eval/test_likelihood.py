"""Forced texts: what follows, what is repeated, and that everything fits."""

from collections.abc import Callable
from typing import Any

import pytest

from uncomp.eval.tasks import likelihood
from uncomp.eval.tasks.base import Built, Wanted
from uncomp.eval.tasks.filler import RunningText
from uncomp.eval.tasks.fitting import TooShortError
from uncomp.eval.tasks.likelihood import FORCED_TOKENS, REPEAT_SKIP
from uncomp.eval.tasks.sources import builtin_names, builtin_text

DOCUMENT, REPEAT, NEEDLE = likelihood.TASKS
each = pytest.mark.parametrize("task", likelihood.TASKS, ids=lambda task: task.name)


class Words:
    """Tokenizer with a token for every word."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0] * len(text.split())

    def decode(self, token_ids: list[int]) -> str:
        raise NotImplementedError


def build(task: Any, length: int = 2048, count: int = 12, seed: int = 0) -> Built:
    return task.build(Wanted(length, count, seed, Words()))


def test_what_is_forced_is_what_follows_in_the_text() -> None:
    texts = {name: builtin_text(name)[0] for name in builtin_names()}
    for sample in build(DOCUMENT, count=40).samples:
        (turn,) = sample.turns
        text = texts[sample.facts["text"]]
        assert turn.question == turn.prefix == ""
        assert turn.forced.startswith((" ", "\n"))
        # The end of the context is enough: a passage may go from the text's end to its start.
        assert sample.context[-500:] + turn.forced in text
    assert {s.facts["text"] for s in build(DOCUMENT).samples} == set(builtin_names())


def test_what_is_forced_does_not_go_round_the_texts_end(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(f"Sentence number {i} ends here." for i in range(200))
    file = builtin_text(builtin_names()[0])[1]
    monkeypatch.setattr(likelihood, "builtin_text", lambda name: (text, file))
    for sample in build(DOCUMENT, length=600, count=60).samples:
        (turn,) = sample.turns
        assert (sample.context + turn.forced)[-400:] in text


def test_a_passage_of_the_context_is_repeated() -> None:
    depths = []
    for sample in build(REPEAT, count=40).samples:
        (turn,) = sample.turns
        before, found, after = sample.context.partition(turn.forced)
        assert found
        assert len(turn.forced.split()) == FORCED_TOKENS
        share = len(before.split()) / len(sample.context.split())
        assert share == pytest.approx(sample.facts["depth"], abs=0.001)
        assert sample.facts["skip"] == REPEAT_SKIP < sample.facts["forced_tokens"]
        assert len(after.split()) > FORCED_TOKENS  # not what a recent window holds
        depths.append(sample.facts["depth"])
    assert min(depths) < 0.1
    assert max(depths) > 0.6


def test_the_hidden_number_is_forced_after_its_question() -> None:
    for sample in build(NEEDLE, length=4096).samples:
        (turn,) = sample.turns
        key = turn.prefix.split(" for ")[1].split()[0]
        before, found, _ = sample.context.partition(f"for {key} is: {turn.forced.strip()}.")
        assert found
        share = len(before.split()) / len(sample.context.split())
        assert share == pytest.approx(sample.facts["depth"], abs=0.005)
        assert key in turn.question
        assert turn.forced[0] == " "


@each
@pytest.mark.parametrize("length", [1024, 4096])
def test_prompts_fill_the_length_and_never_exceed_it(
    task: Any, length: int, real_tokenizer: Any, longest: Callable[[Any], int]
) -> None:
    made = task.build(Wanted(length, 8, 3, real_tokenizer)).samples
    sizes = [longest(sample) for sample in made]
    assert max(sizes) <= length
    assert min(sizes) > length - 128  # the longest sentences of Moby-Dick
    for sample in made:
        forced = real_tokenizer.encode(sample.turns[0].forced, add_special_tokens=False)
        assert len(forced) == sample.facts["forced_tokens"] <= FORCED_TOKENS
        assert task is NEEDLE or len(forced) > FORCED_TOKENS - 8  # whole words


@each
def test_all_are_plain_text_without_an_answer(task: Any) -> None:
    for sample in build(task).samples:
        assert sample.chat is False
        assert sample.system == ""
        assert [turn.references for turn in sample.turns] == [()]


@each
def test_a_seed_makes_the_same_samples_and_another_seed_others(task: Any) -> None:
    assert build(task) == build(task)
    assert build(task, count=3).samples == build(task).samples[:3]
    pairs = zip(build(task).samples, build(task, seed=1).samples, strict=True)
    assert all(a.context != b.context for a, b in pairs)


@each
def test_too_short_says_what_would_do(task: Any) -> None:
    with pytest.raises(TooShortError, match=rf"{task.name}: .* at least") as error:
        build(task, length=100)
    assert build(task, length=error.value.needed).samples


def test_longer_than_the_text_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"wanted, but the whole text has \d+: ask for less"):
        build(DOCUMENT, length=200_000)


def test_every_start_can_be_drawn_and_the_text_goes_round() -> None:
    import random

    running = RunningText("One two. Three four. Five six. Seven eight.", Words())
    draws = [running.passage(5, random.Random(i)) for i in range(40)]
    assert {p.sentences[0].strip() for p in draws} == {
        "One two.", "Three four.", "Five six.", "Seven eight."
    }  # fmt: skip
    assert {(p.text, p.seam) for p in draws} == {
        ("One two. Three four.", None),
        ("Three four. Five six.", None),
        ("Five six. Seven eight.", None),
        ("Seven eight. One two.", 1),
    }
