"""How many units fill a prompt."""

import itertools

import pytest

from uncomp.eval.tasks.base import Sample, Turn
from uncomp.eval.tasks.fitting import FILLED, TooShortError, fit, size


class Letters:
    """Tokenizer with one token for each letter, and a special one."""

    def __init__(self) -> None:
        self.counted: list[int] = []

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.counted.append(len(text))
        return [0] * (len(text) + add_special_tokens)

    def decode(self, token_ids: list[int]) -> str:
        raise NotImplementedError


def sample(units: int, per_unit: int = 1) -> Sample:
    turn = Turn("question", max_tokens=10, prefix=" prefix")
    return Sample("test/task", "1", "f1", "u" * per_unit * units, (turn,), head="head")


def test_size_counts_everything_that_is_sent_and_the_answer() -> None:
    assert size(sample(5), Letters()) == 1 + len("headuuuuuquestion prefix") + 10


def test_size_is_that_of_the_longest_turn() -> None:
    turns = (Turn("a", max_tokens=5), Turn("aaa", max_tokens=1), Turn("a", max_tokens=9))
    assert size(Sample("t", "1", "f1", "", turns), Letters()) == 1 + 1 + 9


@pytest.mark.parametrize("start", [1, 50, 3000, 100_000])
@pytest.mark.parametrize("per_unit", [1, 7, 30])
def test_samples_fill_the_length_in_few_tries(start: int, per_unit: int) -> None:
    tokenizer = Letters()
    units, made = fit(
        lambda n: sample(n, per_unit), tokenizer, 4096, start=start, most=1 << 30, least=1
    )
    assert made == sample(units, per_unit)
    assert FILLED * 4096 <= size(made, Letters()) <= 4096
    assert len(tokenizer.counted) <= 14


def test_units_too_large_to_fill_leave_as_little_as_possible() -> None:
    units, _ = fit(lambda n: sample(n, 400), Letters(), 1000, start=9, most=99)
    assert units == 2  # 30 + 800; a third would make 1230


@pytest.mark.parametrize("length", range(35, 80))
def test_length_that_jumps_up_and_down_still_fits(length: int) -> None:
    jumps = (0, 9, 3, 14, 7)

    def make(units: int) -> Sample:
        return sample(units + jumps[units % 5])

    _, made = fit(make, Letters(), length + 10, start=20, most=500)
    assert size(made, Letters()) <= length + 10


def test_no_more_units_than_there_are() -> None:
    assert fit(sample, Letters(), 4096, start=5, most=40)[0] == 40


def test_where_length_hardly_grows_guesses_stay_near() -> None:
    tokenizer = Letters()
    sizes = [*itertools.accumulate([1] * 10 + [60] * 1000)]
    fit(lambda n: sample(sizes[min(n, 1000)]), tokenizer, 4096, start=3, most=1 << 30)
    assert max(tokenizer.counted) < 3 * 4096


def test_too_short_a_length_says_what_is_needed() -> None:
    with pytest.raises(
        TooShortError, match="test/task: a length of 30 tokens is too short"
    ) as info:
        fit(sample, Letters(), 30, start=9, most=99, least=4)
    assert info.value.needed == size(sample(4), Letters())
