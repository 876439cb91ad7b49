"""Samples of a wanted length: how many units (words, sentences, pairs) fill the prompt."""

from __future__ import annotations

from collections.abc import Callable

from uncomp.eval.tasks.base import Sample, Tokenizer, Turn

#: a sample that fills this share of the wanted length is not made longer
FILLED = 0.97
_AIM = 0.99  # the next sample of the same number of units is a little longer or shorter
_LEAP = 8  # at most so many more than the double: where length hardly grows, guesses go astray


class TooShortError(ValueError):
    """The wanted length has no room for the smallest sample.

    Attributes:
        needed: tokens of that sample, answer included.
    """

    def __init__(self, task: str, length: int, needed: int) -> None:
        super().__init__(
            f"{task}: a length of {length} tokens is too short, this needs about {needed} at least"
        )
        self.needed = needed


def size(sample: Sample, tokenizer: Tokenizer) -> int:
    """Tokens of the longest turn's prompt and answer: special tokens, but no chat template."""

    def tokens(turn: Turn) -> int:
        text = f"{sample.head}{sample.context}{turn.question}{turn.prefix}"
        return len(tokenizer.encode(text, add_special_tokens=True)) + turn.max_tokens

    return max(tokens(turn) for turn in sample.turns)


def fit(
    make: Callable[[int], Sample],
    tokenizer: Tokenizer,
    length: int,
    *,
    most: int,
    start: int,
    least: int = 1,
) -> tuple[int, Sample]:
    """The sample that fills ``length`` tokens to at least :data:`FILLED`, or as far as units allow.

    Args:
        make: sample of so many units; the same every time it is called with the same number.
        tokenizer: counts.
        length: tokens of prompt and answer at most.
        least, most: range of the number of units.
        start: first guess, e.g. what fitted the sample before.

    Returns:
        Number of units and the sample.

    Raises:
        TooShortError: if ``least`` units are too long.
    """
    low: tuple[int, Sample] | None = None  # fits
    high = most + 1  # too long, or not there
    slope, before = 0.0, (0, 0)
    units = min(max(start, least), most)
    while True:
        sample = make(units)
        tokens = size(sample, tokenizer)
        if tokens <= length:
            low = (units, sample)
            if tokens >= FILLED * length:
                return low
        elif units == least:
            raise TooShortError(sample.task, length, tokens)
        else:
            high = units
        floor = least if low is None else low[0] + 1
        if low is not None and floor >= high:
            return low
        if units != before[0]:
            slope = (tokens - before[1]) / (units - before[0])
        before = (units, tokens)
        # Length is about linear in units; where chance says otherwise, halve what is left.
        step = int((_AIM * length - tokens) / slope) if slope > 0 else 0
        units = min(units + step if step else (floor + high - 1) // 2, 2 * units + _LEAP)
        units = min(max(units, floor), high - 1)
