"""Long answers: their scores against definitions, and what is asked for."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uncomp.eval.tasks import generation
from uncomp.eval.tasks.base import Sample, Turn, Wanted
from uncomp.eval.tasks.filler import tokens_of
from uncomp.eval.tasks.fitting import TooShortError
from uncomp.eval.tasks.generation import ANSWER_TOKENS, METRICS

COPY, COUNT = generation.TASKS
both = pytest.mark.parametrize("task", generation.TASKS, ids=lambda task: task.name)
WEEK = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class Words:
    """Tokenizer with a token for every word."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0] * len(text.split())

    def decode(self, token_ids: list[int]) -> str:
        raise NotImplementedError


def samples(task: Any, length: int = 2048, count: int = 8, seed: int = 0) -> list[Sample]:
    return list(task.build(Wanted(length, count, seed, Words())).samples)


def score(metric: str, answer: str, right: str) -> float:
    turn = Turn("?", (right,))
    return METRICS[metric](answer, turn, Sample("generation/copy", "0", metric, "", (turn,)))


@pytest.mark.parametrize(
    ("answer", "in_order", "before_error"),
    [
        ("a\nb\nc\nd", 1, 1),
        ("\n a \n\nb\nc\nd\nand more", 1, 1),
        ("a\nb", 0.5, 0.5),
        ("a\nc\nd", 0.75, 0.25),  # one line left out
        ("a\nx\nc\nd", 0.75, 0.25),  # one line wrong
        ("x\na\nb\nc\nd", 1, 0),  # one line too many
        ("d\nc\nb\na", 0.25, 0),
        ("a\na\na\na", 0.25, 0.25),
        ("c\nd\na\nb", 0.5, 0),
        ("", 0, 0),
        ("a b c d", 0, 0),
    ],
)
def test_scores_of_answers(answer: str, in_order: float, before_error: float) -> None:
    assert score("lines_in_order", answer, "a\nb\nc\nd") == in_order
    assert score("lines_before_error", answer, "a\nb\nc\nd") == before_error


@settings(max_examples=200, deadline=None, derandomize=True)
@given(said=st.text("abcdefgh", max_size=14), right=st.permutations("abcdef"))
def test_lines_in_order_is_the_longest_common_subsequence(said: str, right: list[str]) -> None:
    @cache
    def common(i: int, j: int) -> int:
        if i == len(said) or j == len(right):
            return 0
        if said[i] == right[j]:
            return 1 + common(i + 1, j + 1)
        return max(common(i + 1, j), common(i, j + 1))

    assert score("lines_in_order", "\n".join(said), "\n".join(right)) == common(0, 0) / 6


def test_equal_right_lines_are_an_error() -> None:
    with pytest.raises(ValueError, match="must differ"):
        score("lines_in_order", "a", "a\nb\na")


@both
def test_the_right_answer_scores_one_and_the_prompt_alone_nothing(task: Any) -> None:
    for sample in samples(task):
        (turn,) = sample.turns
        for metric in METRICS.values():
            assert metric(turn.references[0], turn, sample) == 1
            assert metric(turn.prefix, turn, sample) == 0
        assert sample.facts["lines"] == len(turn.references[0].splitlines())


@both
@pytest.mark.parametrize("length", [1024, 4096])
def test_prompts_fill_the_length_and_never_exceed_it(
    task: Any, length: int, real_tokenizer: Any, longest: Callable[[Sample], int]
) -> None:
    made = task.build(Wanted(length, 6, 3, real_tokenizer)).samples
    sizes = [longest(sample) for sample in made]
    assert max(sizes) <= length
    assert min(sizes) > length - 192  # room for other chat templates, and most of a sentence
    for sample in made:
        (turn,) = sample.turns
        answer = tokens_of(real_tokenizer, turn.references[0])
        assert answer < turn.max_tokens < 1.2 * answer + 9
        if length == 4096:
            assert 0.9 * ANSWER_TOKENS < answer <= ANSWER_TOKENS


@both
def test_a_seed_makes_the_same_samples_and_another_seed_others(task: Any) -> None:
    assert samples(task) == samples(task)
    assert samples(task, count=3) == samples(task)[:3]
    assert all(a != b for a, b in zip(samples(task), samples(task, seed=1), strict=True))


@both
def test_too_short_says_what_would_do(task: Any) -> None:
    with pytest.raises(TooShortError, match=rf"{task.name}: .* at least") as error:
        samples(task, length=150)
    for more in (0, 8, 64, 256):  # longer lists too must fit
        assert samples(task, length=error.value.needed + 8 + more)


def test_the_list_stands_in_the_text_at_its_depth() -> None:
    depths = set()
    for sample in samples(COPY, length=4096):
        (turn,) = sample.turns
        records = f"List of records:\n{turn.prefix}{turn.references[0]}\nEnd of the list."
        before, found, after = sample.context.partition(records)
        assert found
        around = len(before.split()) + len(after.split())
        assert len(before.split()) / around == pytest.approx(sample.facts["depth"], abs=0.01)
        depths.add(sample.facts["depth"])
    assert max(depths) - min(depths) > 0.3


def test_days_count_on_by_number_and_weekday() -> None:
    for sample in samples(COUNT):
        (turn,) = sample.turns
        lines = (turn.prefix + turn.references[0]).splitlines()
        start, weekday = int(lines[0].split()[1][:-1]), WEEK.index(lines[0].split()[2])
        assert lines == [f"Day {start + i}: {WEEK[(weekday + i) % 7]}" for i in range(len(lines))]
        assert turn.stop == (f"Day {start + len(lines)}:",)
        assert lines[0] in turn.question
        assert lines[-1] in turn.question
        assert len(turn.prefix.splitlines()) == 3
        assert turn.prefix.endswith("\n")
    assert len({s.turns[0].prefix.split()[2] for s in samples(COUNT, count=20)}) > 4
