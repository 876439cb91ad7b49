"""Several questions over one document: where the answers stand, and that everything fits."""

from collections.abc import Callable
from typing import Any

import pytest

from uncomp.eval.tasks import multiturn
from uncomp.eval.tasks.base import Sample, Wanted
from uncomp.eval.tasks.fitting import TooShortError
from uncomp.eval.tasks.scorers import METRICS

KEYS, QA = multiturn.TASKS
both = pytest.mark.parametrize("task", multiturn.TASKS, ids=lambda task: task.name)


class Words:
    """Tokenizer with a token for every word."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0] * len(text.split())

    def decode(self, token_ids: list[int]) -> str:
        raise NotImplementedError


def samples(task: Any, length: int = 2048, count: int = 12, seed: int = 0) -> list[Sample]:
    return list(task.build(Wanted(length, count, seed, Words())).samples)


@both
@pytest.mark.parametrize("length", [1024, 4096, 16384])
def test_prompts_fill_the_length_and_never_exceed_it(
    task: Any, length: int, real_tokenizer: Any, longest: Callable[[Sample], int]
) -> None:
    made = task.build(Wanted(length, 6, 3, real_tokenizer)).samples
    sizes = [longest(sample) for sample in made]
    assert max(sizes) <= length
    # What is left free for other chat templates, and a sentence or short paragraph that did not
    # fit: together below 192 tokens.
    assert min(sizes) > length - 192


@both
def test_a_seed_makes_the_same_samples_and_another_seed_others(task: Any) -> None:
    assert samples(task) == samples(task)
    assert samples(task, count=3) == samples(task)[:3]
    assert all(a != b for a, b in zip(samples(task), samples(task, seed=1), strict=True))
    assert len({sample.id for sample in samples(task)}) == 12


@both
def test_too_short_says_what_would_do(task: Any) -> None:
    with pytest.raises(TooShortError, match=rf"{task.name}: a length of 300 .* at least") as error:
        samples(task, length=300)
    assert samples(task, length=error.value.needed + 64, count=1)


@both
def test_all_questions_differ_and_are_not_asked_in_the_documents_order(task: Any) -> None:
    made = samples(task)
    for sample in made:
        assert len({turn.question.strip() for turn in sample.turns}) == multiturn.TURNS
        assert sample.facts["turns"] == len(sample.facts["depths"]) == multiturn.TURNS
    # Of 12 random orders of four, 0.5 are expected to be sorted.
    assert sum(s.facts["depths"] == sorted(s.facts["depths"]) for s in made) < 6


def test_every_number_is_hidden_once_at_its_depth() -> None:
    for sample in samples(KEYS, length=8192):
        words = sample.context.split()
        assert sample.context.count("One of the special magic numbers for") == multiturn.NEEDLES
        for turn, depth in zip(sample.turns, sample.facts["depths"], strict=True):
            (number,) = turn.references
            key = turn.question.split(" for ")[1].split()[0]
            assert sample.context.count(f"numbers for {key} is: {number}.") == 1
            # The depth leaves the numbers' own sentences out, which is at most 1.5 %.
            assert words.index(f"{number}.") / len(words) == pytest.approx(depth, abs=0.015)
            assert METRICS[sample.metric](f" It is {number}.", turn, sample) == 1
            others = [r for t in sample.turns if t is not turn for r in t.references]
            assert METRICS[sample.metric](" ".join(others), turn, sample) == 0


def test_depths_reach_over_the_whole_document() -> None:
    for task in (KEYS, QA):
        depths = [depth for s in samples(task, length=4096) for depth in s.facts["depths"]]
        assert min(depths) < 0.2
        assert max(depths) > 0.75


def test_answers_stand_in_the_paragraph_at_the_depth() -> None:
    for sample in samples(QA, length=4096):
        blocks = sample.context.split("\n\n")
        total = sum(len(block.split()) for block in blocks)
        title = sample.facts["article"]
        assert sum(block.startswith(f"{title}\n") for block in blocks) >= multiturn.TURNS
        assert len({block.split("\n")[0] for block in blocks}) > 1  # other articles
        for turn, depth in zip(sample.turns, sample.facts["depths"], strict=True):
            before, at = 0, 0
            while before < round(depth * total):
                before += len(blocks[at].split())
                at += 1
            # A depth of 4 digits can be a word off, so the paragraph may be the one before.
            near = blocks[max(at - 1, 0) : at + 1]
            assert any(
                block.startswith(f"{title}\n") and all(a in block for a in turn.references)
                for block in near
            )
            assert METRICS[sample.metric](turn.references[-1], turn, sample) == 1
            assert METRICS[sample.metric]("nothing of it", turn, sample) < 0.5


def test_every_article_comes_once_before_one_comes_again() -> None:
    titles = [s.facts["article"] for s in samples(QA, length=4096, count=40)]
    assert len(set(titles[:35])) == 35
    assert titles[35:] == titles[:5]


def test_longer_than_all_articles_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"the articles end \d+ tokens before"):
        samples(QA, length=500_000, count=1)
