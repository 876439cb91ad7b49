"""Needle in a haystack: where it is hidden, and that samples fill the length."""

import random
import re

import pytest

from uncomp.eval.tasks import needle
from uncomp.eval.tasks.base import Built, Wanted
from uncomp.eval.tasks.fitting import FILLED, size
from uncomp.eval.tasks.sources import builtin_names, builtin_text

(TASK,) = needle.TASKS


class Pieces:
    """Tokenizer with a token for every four letters."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0] * len(re.findall(r"\w{1,4}|[^\w\s]", text))

    def decode(self, token_ids: list[int]) -> str:
        raise NotImplementedError


def build(length: int = 1024, count: int = 11, seed: int = 0) -> Built:
    return TASK.build(Wanted(length, count, seed, Pieces()))


@pytest.mark.parametrize(
    ("count", "expected"), [(1, (0.5,)), (2, (0, 1)), (5, (0, 0.25, 0.5, 0.75, 1))]
)
def test_depths_are_evenly_spaced(count: int, expected: tuple[float, ...]) -> None:
    assert needle.depths(count) == expected


@pytest.mark.parametrize("length", [256, 1024, 8192])
def test_samples_fill_the_length_and_never_exceed_it(length: int) -> None:
    sizes = [size(sample, Pieces()) for sample in build(length).samples]
    assert len(sizes) == 11
    assert max(sizes) <= length
    assert min(sizes) >= FILLED * length


def test_the_number_is_hidden_once_near_its_depth_between_sentences() -> None:
    for i, sample in enumerate(build(4096).samples):
        (turn,) = sample.turns
        (number,) = turn.references
        assert re.fullmatch(r"[1-9]\d{6}", number)
        assert sample.context.count(number) == 1
        assert sample.facts == {"length": 4096, "depth": round(i / 10, 4)}
        before, _, after = sample.context.partition("One of the special magic numbers for ")
        assert len(before) / len(sample.context) == pytest.approx(i / 10, abs=0.05)
        if 0 < i < 10:
            assert re.search(r"[.!?]\W*$", before)
        key = after.split(" is: ")[0]
        assert turn.question == (
            f"\nWhat is the special magic number for {key} mentioned in the provided text?"
        )
        assert turn.prefix == (
            f" The special magic number for {key} mentioned in the provided text is"
        )
        assert sample.metric == "contains"


def test_the_rest_is_packaged_text_that_goes_round() -> None:
    built = build(512, count=2)
    text = " ".join(" ".join(builtin_text(name)[0] for name in builtin_names()).split())
    for sample in built.samples:
        hidden = re.sub(r"One of the special magic numbers for \S+ is: \d+\.", "", sample.context)
        assert " ".join(hidden.split()) in f"{text} {text}"
    assert built.data == tuple(builtin_text(name)[1] for name in builtin_names())


def test_same_seed_same_samples() -> None:
    random.seed(1)
    first = build(seed=3)
    random.seed(2)
    assert build(seed=3) == first
    assert len({sample.id for sample in first.samples}) == 11
    other = build(seed=4)
    assert all(a.context != b.context for a, b in zip(first.samples, other.samples, strict=True))
    assert len({sample.turns[0].references for sample in first.samples}) == 11


def test_too_short_a_length_says_the_least() -> None:
    with pytest.raises(ValueError, match="needle: a length of 64 tokens is too short, this needs"):
        build(64)
