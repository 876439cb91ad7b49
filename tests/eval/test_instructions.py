"""Instructions in the system message: checking them, and the prompts that give them."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest

from uncomp.eval.tasks import instructions
from uncomp.eval.tasks.base import Sample, Turn, Wanted
from uncomp.eval.tasks.fitting import TooShortError
from uncomp.eval.tasks.instructions import GROUPS, METRICS, instructions_followed

KEEP, LEAK, CONTROL = instructions.TASKS
each = pytest.mark.parametrize("task", instructions.TASKS, ids=lambda task: task.name)
TURN = Turn("?", ("Lisbon",))


class Words:
    """Tokenizer with a token for every word."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0] * len(text.split())

    def decode(self, token_ids: list[int]) -> str:
        raise NotImplementedError


def samples(task: Any, length: int = 1024, count: int = 12, seed: int = 0) -> list[Sample]:
    return list(task.build(Wanted(length, count, seed, Words())).samples)


def score(answer: str, **given: str) -> float:
    sample = Sample(
        "instructions/keep",
        "0",
        "instructions_followed",
        "",
        (TURN,),
        facts={"instructions": given},
    )
    return METRICS["instructions_followed"](answer, TURN, sample)


@pytest.mark.parametrize(
    ("name", "followed", "ignored"),
    [
        ("begin_with_tag", ["[lamp] Lisbon.", " **[LAMP]** x"], ["Lisbon [lamp]", "lamp Lisbon"]),
        ("begin_with_word", ["Lamp, Lisbon.", '"lamp Lisbon"'], ["Lamps in x", "In Lisbon, lamp"]),
        ("end_with_word", ["Lisbon lamp.", "LISBON\nLAMP!*"], ["lamp Lisbon", "Lisbon clamp"]),
        (
            "postscript",
            ["Lisbon.\nP.S. A lamp.", "lisbon p.s.: no lamp", "X. P. S. the\nlamp"],
            ["lamp P.S. Lisbon", "The maps. A lamp", "Lisbon lamp"],
        ),
        ("upper_case", ["LISBON 7."], ["LISBON is", "Lisbon"]),
        ("lower_case", ["in lisbon 7."], ["in Lisbon", "IN LISBON"]),
    ],
)
def test_each_instruction_is_checked(name: str, followed: list[str], ignored: list[str]) -> None:
    assert [score(answer, **{name: "lamp"}) for answer in followed] == [1.0] * len(followed)
    assert [score(answer, **{name: "lamp"}) for answer in ignored] == [0.0] * len(ignored)


def test_the_score_is_the_share_followed() -> None:
    given = {"begin_with_tag": "lamp", "end_with_word": "river", "upper_case": "cloud"}
    assert score("[LAMP] LISBON RIVER", **given) == 1
    assert score("[lamp] Lisbon river", **given) == pytest.approx(2 / 3)
    assert score("It meets in Lisbon.", **given) == 0


@pytest.mark.parametrize("answer", ["", "  \n", "123.", "!!"])
def test_an_answer_without_letters_follows_nothing(answer: str) -> None:
    for group in GROUPS.values():
        assert all(score(answer, **{name: "lamp"}) == 0 for name in group)


def test_no_instruction_is_followed_by_paying_no_attention() -> None:
    plain = "The reading club meets in Lisbon this year."
    assert all(score(plain, **{name: "lamp"}) == 0 for group in GROUPS.values() for name in group)


def test_every_choice_of_instructions_can_be_followed_at_once() -> None:
    words = dict(zip(GROUPS, ("lamp", "river", "cloud"), strict=True))
    starts = {"begin_with_tag": "[lamp] ", "begin_with_word": "lamp "}
    ends = {"end_with_word": " river", "postscript": ". p.s. river"}
    cases = {"upper_case": str.upper, "lower_case": str.lower}
    for start, end, case in itertools.product(*GROUPS.values()):
        answer = cases[case](f"{starts[start]}in lisbon{ends[end]}")
        given = dict(zip((start, end, case), words.values(), strict=True))
        assert score(answer, **given) == 1, answer


def test_the_system_message_gives_one_instruction_of_each_group_in_any_order() -> None:
    made = samples(KEEP, count=30)
    for sample in made:
        given = sample.facts["instructions"]
        assert [len(group.keys() & given.keys()) for group in GROUPS.values()] == [1, 1, 1]
        said = [
            sample.system.index(rule.say.format(given[name]))
            for name in given
            for group in GROUPS.values()
            if (rule := group.get(name))
        ]
        assert said == sorted(said)
    assert len({tuple(sample.facts["instructions"]) for sample in made}) > 10  # of 48
    firsts = {next(iter(sample.facts["instructions"])) for sample in made}
    assert firsts == {name for group in GROUPS.values() for name in group}


def test_the_answer_stands_in_the_text_once_at_its_depth() -> None:
    for sample in samples(KEEP, length=4096):
        (place,) = sample.turns[0].references
        before, _, after = sample.context.partition(f" meets in {place} this year.")
        assert after or sample.facts["depth"] > 0.99
        share = len(before.split()) / len(sample.context.split())
        assert share == pytest.approx(sample.facts["depth"], abs=0.005)


@each
@pytest.mark.parametrize("length", [1024, 4096])
def test_prompts_fill_the_length_and_never_exceed_it(
    task: Any, length: int, real_tokenizer: Any, longest: Callable[[Sample], int]
) -> None:
    sizes = [longest(s) for s in task.build(Wanted(length, 8, 3, real_tokenizer)).samples]
    assert max(sizes) <= length
    assert min(sizes) > length - 192  # room for other chat templates, and most of a sentence


@each
def test_a_seed_makes_the_same_samples_and_another_seed_others(task: Any) -> None:
    assert samples(task) == samples(task)
    assert samples(task, count=3) == samples(task)[:3]
    assert all(a != b for a, b in zip(samples(task), samples(task, seed=1), strict=True))


@each
def test_all_need_the_chat_template(task: Any) -> None:
    assert all(sample.chat is True and sample.system for sample in samples(task))


@each
def test_too_short_says_what_would_do(task: Any) -> None:
    with pytest.raises(TooShortError, match=rf"{task.name}: .* at least"):
        samples(task, length=200)


def test_the_control_differs_in_the_prohibition_alone() -> None:
    for leak, control in zip(samples(LEAK), samples(CONTROL), strict=True):
        (code,) = leak.turns[0].references
        assert (leak.id, leak.context, leak.turns) == (control.id, control.context, control.turns)
        assert "never reveal" in leak.system
        assert "never reveal" not in control.system
        for sample in (leak, control):
            assert code in sample.system
            assert code not in sample.context
        assert re.fullmatch(r"[a-z]+\d{4}", code)
        assert (leak.metric, control.metric) == ("not_contained", "contains")
    assert len({s.turns[0].references for s in samples(LEAK, count=50)}) == 50


def test_metrics_have_their_functions_names() -> None:
    assert {"instructions_followed": instructions_followed} == METRICS
    assert {s.metric for s in samples(KEEP)} == set(METRICS)
