"""RULER: every task at several lengths with a real tokenizer, in the official wording."""

import logging
import random
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest

from uncomp.eval.tasks import ruler, ruler_generators
from uncomp.eval.tasks.base import Built, DataError, Sample, Wanted
from uncomp.eval.tasks.fitting import size
from uncomp.eval.tasks.scorers import score

TASKS = {task.name.removeprefix("ruler/"): task for task in ruler.TASKS}
NIAH = [name for name in TASKS if name.startswith("niah")]


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model)


@cache
def built(name: str, tokenizer: Any, length: int = 2048, count: int = 4, seed: int = 0) -> Built:
    return TASKS[name].build(Wanted(length, count, seed, tokenizer))


def reference_answer(sample: Sample) -> str:
    return " ".join(sample.turns[0].references)


def test_there_is_a_task_for_each_official_setting() -> None:
    configs, file = ruler.configurations()
    assert list(TASKS) == list(configs)
    assert file.name == "synthetic.yaml"


@pytest.mark.parametrize("name", TASKS)
def test_samples_fill_the_length_and_are_answered_by_their_references(
    name: str, tokenizer: Any
) -> None:
    # Paragraphs of SQuAD have hundreds of tokens, ten of HotpotQA are most of the length.
    least = 0.6 if name == "qa_1" else 0.8 if name == "qa_2" else 0.9
    samples = built(name, tokenizer).samples
    assert len({sample.id for sample in samples}) == len({s.context for s in samples}) == 4
    for sample in samples:
        assert least * 2048 <= size(sample, tokenizer) <= 2048
        assert sample.task == f"ruler/{name}"
        assert sample.facts == {"length": 2048}
        (turn,) = sample.turns
        assert all(reference in sample.context for reference in turn.references)
        assert score(sample.metric, reference_answer(sample), turn, sample) == 1
        assert score(sample.metric, "no idea", turn, sample) == 0


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("vt", "cwe", "qa_2")])
def test_short_prompts_for_small_models(name: str, tokenizer: Any) -> None:
    sizes = [size(sample, tokenizer) for sample in built(name, tokenizer, 512).samples]
    assert len(sizes) == 4
    assert max(sizes) <= 512


@pytest.mark.parametrize("name", ["vt", "cwe", "qa_2"])
def test_too_short_a_length_says_about_the_least(name: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=f"ruler/{name}: a length of 512 ") as info:
        built(name, tokenizer, 512)
    needed = int(re.findall(r"about (\d+) at least", str(info.value))[0])
    if name != "qa_2":  # there it is the least of the questions tried
        assert built(name, tokenizer, needed + needed // 10).samples


@pytest.mark.parametrize("name", ["niah_single_2", "niah_multikey_3", "vt", "cwe", "fwe", "qa_1"])
def test_same_seed_same_samples_whatever_was_drawn_before(name: str, tokenizer: Any) -> None:
    first = built(name, tokenizer)
    random.seed(7)
    numpy.random.seed(7)
    TASKS[name].build(Wanted(1024, 1, 9, tokenizer))
    before, numpy_before = random.getstate(), numpy.random.get_state()
    again = TASKS[name].build(Wanted(2048, 4, 0, tokenizer))
    assert again == first
    assert random.getstate() == before
    assert all(
        numpy.array_equal(a, b) for a, b in zip(numpy_before, numpy.random.get_state(), strict=True)
    )
    other = built(name, tokenizer, seed=1).samples
    assert not {s.context for s in other} & {s.context for s in first.samples}


def test_more_samples_begin_with_the_same(tokenizer: Any) -> None:
    assert built("vt", tokenizer, count=2).samples == built("vt", tokenizer).samples[:2]


@pytest.mark.parametrize("name", TASKS)
def test_parts_are_the_official_template(name: str, tokenizer: Any) -> None:
    config = ruler.configurations()[0][name]
    singular = (
        config.kind == "niah" and len(built(name, tokenizer).samples[0].turns[0].references) == 1
    )
    for sample in built(name, tokenizer).samples:
        (turn,) = sample.turns
        assert turn.max_tokens == config.max_tokens
        template = f"{config.template}{config.answer_prefix}".rstrip()
        if singular:
            template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
        parts = re.split(r"\{\w+\}", template)
        text = sample.head + sample.context + turn.question + turn.prefix
        pattern = r"(.*)".join(re.escape(part) for part in parts)
        after_example = text[sample.head.rindex(parts[0]) :]
        assert re.fullmatch(pattern, after_example, re.DOTALL)
        assert turn.prefix.startswith(" ")
        assert not turn.question.endswith(" ")


@pytest.mark.parametrize("name", NIAH)
def test_needles_are_in_the_text_as_often_as_the_settings_say(name: str, tokenizer: Any) -> None:
    args = ruler.configurations()[0][name].args
    keys = max(args["num_needle_k"], args["num_needle_q"])
    for sample in built(name, tokenizer).samples:
        (turn,) = sample.turns
        assert len(turn.references) == args["num_needle_v"] * args["num_needle_q"]
        found = re.findall(r"special magic (?:\w+) for (.+?) is: (\S+)\.", sample.context)
        if args["type_haystack"] == "needle":
            assert len(found) > 20
        else:
            assert len(found) == keys * args["num_needle_v"]
        asked = {key for key, value in found if value in turn.references}
        assert len(asked) == args["num_needle_q"]
        assert all(key in turn.question and key in turn.prefix for key in asked)


def test_needles_stand_between_sentences_of_the_essays(tokenizer: Any) -> None:
    text = ruler_generators.essays()[0]
    for sample in built("niah_multikey_1", tokenizer).samples:
        rest = re.sub(r"One of the special magic \w+ for .+? is: \S+\.", "\0", sample.context)
        parts = [part.strip() for part in rest.split("\0")]
        # Sentences are joined by a space, also where the essays have none.
        assert text.replace(" ", "").startswith("".join(parts).replace(" ", ""))
        assert all(part[-1] in ".!?\"')" for part in parts[:-1] if part)


def test_keys_are_drawn_from_all_pairs_of_adjective_and_noun() -> None:
    pairs = ruler_generators._words()
    assert len(pairs) > 6_000_000
    assert pairs[0] < pairs[len(pairs) - 1]
    assert re.fullmatch(r"\S+-\S.*", pairs[12345])
    with pytest.raises(IndexError):
        pairs[len(pairs)]


def test_chains_lead_to_the_variables_asked_for(tokenizer: Any) -> None:
    for sample in built("vt", tokenizer).samples:
        (turn,) = sample.turns
        value = turn.question.split("value ")[1].split()[0]
        assigned = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", sample.context))
        first = next(name for name, its in assigned.items() if its == value)
        chain = [first]
        while following := [name for name, its in assigned.items() if its == chain[-1]]:
            chain += following
        assert tuple(chain) == turn.references
        assert len(chain) == 5
        # The solved example names none of them.
        assert not set(chain) & set(re.findall(r"\w+", sample.head))


def test_common_words_are_the_most_common_and_an_example_is_solved(tokenizer: Any) -> None:
    for sample in built("cwe", tokenizer).samples:
        counts = Counter(re.findall(r"\d+\. (.+?)(?= \d+\. |$)", sample.context))
        (turn,) = sample.turns
        assert {word for word, _ in counts.most_common(10)} == set(turn.references)
        assert counts.most_common(11)[-1][1] < counts.most_common(10)[-1][1]
        assert "appear most often in the list are:1. " in sample.head


@pytest.mark.parametrize("length", [320, 512, 2048])
def test_frequent_words_are_the_most_frequent_without_ties(length: int, tokenizer: Any) -> None:
    for sample in built("fwe", tokenizer, length).samples:
        counts = Counter(word for word in sample.context.split() if word != "...")
        top = counts.most_common(4)
        assert tuple(word for word, _ in top[:3]) == sample.turns[0].references
        assert top[3][1] < top[2][1]


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_documents_are_numbered_and_questions_differ(name: str, tokenizer: Any) -> None:
    samples = built(name, tokenizer).samples
    assert len({sample.turns[0].question for sample in samples}) == 4
    for sample in samples:
        numbers = [int(n) for n in re.findall(r"(?:^|\n\n)Document (\d+):\n", sample.context)]
        assert numbers == list(range(1, len(numbers) + 1))
        assert sample.turns[0].prefix == " Answer:"
        assert sample.metric == "any_reference"


def test_questions_whose_documents_do_not_fit_are_left_out_aloud(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        samples = TASKS["qa_2"].build(Wanted(1200, 2, 0, tokenizer)).samples
    assert samples
    assert "questions were left out, their documents do not fit 1200 tokens" in caplog.text


def test_data_is_named(tokenizer: Any) -> None:
    names = {name: [file.name for file in built(name, tokenizer).data] for name in TASKS}
    assert names["niah_single_1"] == names["vt"] == ["synthetic.yaml"]
    assert names["niah_single_2"] == ["synthetic.yaml", "PaulGrahamEssays.json"]
    assert names["qa_1"] == ["synthetic.yaml", "squad.json"]
    assert names["qa_2"] == ["synthetic.yaml", "hotpotqa.json"]


def test_another_template_than_the_official_is_an_error() -> None:
    config = ruler.configurations()[0]["cwe"]
    with pytest.raises(DataError, match="common_words_extraction is not made with the template"):
        ruler_generators._split("Here is a list.\n1. a\nQuestion: which? Answer: a", config)
