"""InfiniteBench: official rows with lm-eval's prompts, and retrieval generated at any length."""

import dataclasses
import json
import re
from importlib import resources
from pathlib import Path

import pytest
import yaml

from uncomp.eval.tasks import hub, infinitebench, scorers
from uncomp.eval.tasks.base import Built, DataError, Wanted
from uncomp.eval.tasks.fitting import FILLED, size

CONTEXT = "The {{ input }} of\nthe book.\n"
TASKS = {task.name.removeprefix("infinitebench/"): task for task in infinitebench.TASKS}
OFFICIAL = [name for name in TASKS if not name.endswith("_generated")]
GENERATED = [name for name in TASKS if name.endswith("_generated")]
OPTIONS = ["alpha", "beta", "gamma", "delta"]


class Pieces:
    """Tokenizer with a token for each word, digit and mark."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0] * len(re.findall(r"[A-Za-z]+|\d|[^\w\s]", text))

    def decode(self, token_ids: list[int]) -> str:
        raise NotImplementedError


@pytest.fixture
def unpublished(monkeypatch):
    """Lets files of a test stand for official ones whose hash is published."""
    monkeypatch.setattr(hub, "PUBLISHED", {})


def row(index: int = 0, **fields) -> dict:
    """One row as InfiniteBench distributes it."""
    return {
        "id": 40 + index,
        "context": CONTEXT,
        "input": "What is the pass key?",
        "answer": ["71432"],
        "options": [],
    } | fields


def build(folder: Path, name: str, rows: list[dict], count: int = 10, length: int = 2000) -> Built:
    path = folder / "InfiniteBench" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in rows), encoding="utf-8")
    return TASKS[name].build(Wanted(length, count, 0, Pieces(), folder))


def task_file(name: str) -> dict:
    """lm-eval's task file, read without the code under test."""
    file = f"infinitebench_{name.replace('_eng', '_en')}.yaml"
    path = resources.files("lm_eval") / "tasks" / "infinitebench" / file
    return yaml.safe_load(path.read_text(encoding="utf-8").replace("!function ", ""))


@pytest.mark.parametrize("name", ["passkey", "number_string", "kv_retrieval", "longbook_qa_eng"])
@pytest.mark.usefixtures("unpublished")
def test_prompt_of_a_template(tmp_path, name):
    (sample,) = build(tmp_path, name, [row()]).samples
    task = task_file(name)
    (turn,) = sample.turns
    template = task["description"] + task["doc_to_text"]
    head, question = template.replace("{{input}}", "What is the pass key?").split("{{context}}")
    assert (sample.head, sample.context, turn.question) == (head, CONTEXT, question)
    assert turn.max_tokens == task["generation_kwargs"]["max_gen_toks"]
    assert list(turn.stop) == task["generation_kwargs"]["until"]


@pytest.mark.parametrize(
    "name", ["longbook_choice_eng", "longdialogue_qa_eng", "code_debug", "math_find"]
)
def test_prompt_of_a_function(tmp_path, name):
    from lm_eval.tasks.infinitebench import utils

    line = row(input="The largest number of the list is", options=OPTIONS, answer=["beta"])
    (sample,) = build(tmp_path, name, [line]).samples
    whole = getattr(utils, task_file(name)["doc_to_text"].removeprefix("utils."))(line)
    assert sample.head + sample.context + sample.turns[0].question == whole
    assert sample.context == CONTEXT
    assert sample.head


@pytest.mark.parametrize(
    ("name", "metric", "prefix"),
    [
        ("passkey", "number_match", "\n\nThe pass key is"),
        ("number_string", "number_match", "\n\nThe sequence of digits is"),
        ("kv_retrieval", "any_reference", ""),
        ("longbook_qa_eng", "f1", ""),
        ("longbook_choice_eng", "choice", ""),
        ("longdialogue_qa_eng", "any_reference", ""),
        ("code_debug", "choice", ""),
        ("math_find", "number_match", ""),
    ],
)
@pytest.mark.usefixtures("unpublished")
def test_metric_and_prefix(tmp_path, name, metric, prefix):
    (sample,) = build(tmp_path, name, [row(options=OPTIONS, answer=["gamma"])]).samples
    assert (sample.metric, sample.turns[0].prefix) == (metric, prefix)
    assert (sample.task, sample.id) == (f"infinitebench/{name}", "40")
    (turn,) = sample.turns
    said = "42" if metric == "number_match" else turn.references[0]
    turn = dataclasses.replace(turn, references=(said,))
    assert scorers.score(metric, f" {said}.", turn, sample) == 1
    assert scorers.score(metric, "nothing like it", turn, sample) == 0


@pytest.mark.parametrize(
    ("answer", "references"),
    [(["gamma"], ("C",)), ("D", ("D",)), (["delta", "D"], ("D", "D"))],
    ids=["text", "letter", "both"],
)
def test_choices_are_letters(tmp_path, answer, references):
    (sample,) = build(tmp_path, "code_debug", [row(options=OPTIONS, answer=answer)]).samples
    assert sample.turns[0].references == references


def test_unknown_choice_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"answer \['omega'\] is neither a letter nor one of"):
        build(tmp_path, "code_debug", [row(options=OPTIONS, answer=["omega"])])


@pytest.mark.parametrize("answer", ["71432", ["71432"], 71432])
def test_answers_of_any_type(tmp_path, answer):
    (sample,) = build(tmp_path, "passkey", [row(answer=answer)]).samples
    assert sample.turns[0].references == ("71432",)


def test_data_is_recorded_and_other_rows_refused(tmp_path):
    data, task = build(tmp_path, "passkey", [row()]).data
    assert data.name == "passkey.jsonl"
    assert len(data.sha256) == 64
    assert task.name == "infinitebench_passkey.yaml"
    with pytest.raises(DataError, match="row 1 lacks context"):
        build(tmp_path, "passkey", [{"input": "", "answer": "1"}])


def test_changed_file_is_refused(tmp_path):
    """The hash of this one file is published."""
    with pytest.raises(DataError, match="is published for it"):
        build(tmp_path, "longbook_qa_eng", [row()])


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("length", [400, 4096])
def test_generated_samples_fill_the_length(name, length):
    built = TASKS[name].build(Wanted(length, 5, 0, Pieces()))
    assert [sample.facts["depth"] for sample in built.samples] == [0, 0.25, 0.5, 0.75, 1]
    for sample in built.samples:
        # Short ones cannot be filled to the share: a pair takes about 70 tokens.
        assert min(FILLED * length, length - 80) <= size(sample, Pieces()) <= length
        assert sample.task == f"infinitebench/{name}"


@pytest.mark.parametrize("name", GENERATED)
def test_generated_samples_come_from_the_seed(name):
    def contexts(seed: int) -> list[str]:
        return [s.context for s in TASKS[name].build(Wanted(500, 3, seed, Pieces())).samples]

    assert contexts(1) == contexts(1)
    assert not set(contexts(1)) & set(contexts(2))


@pytest.mark.parametrize("name", ["passkey_generated", "number_string_generated"])
def test_generated_needle(name):
    samples = TASKS[name].build(Wanted(1000, 3, 3, Pieces())).samples
    for sample, place in zip(samples, (0, 0.5, 1), strict=True):
        (key,) = sample.turns[0].references
        assert len(key) == {"passkey_generated": 5, "number_string_generated": 10}[name]
        lines = sample.context.splitlines()
        (at,) = [i for i, line in enumerate(lines) if key in line]
        assert abs(at / (len(lines) - 1) - place) < 0.05
        assert sample.context.count(key) == 2
        assert sample.turns[0].question.endswith("?")


def test_generated_pairs():
    for sample in TASKS["kv_retrieval_generated"].build(Wanted(1500, 3, 0, Pieces())).samples:
        (value,) = sample.turns[0].references
        pairs = json.loads(sample.context.removeprefix("JSON data:\n"))
        key = re.search(r'Key: "(.*)"', sample.turns[0].question).group(1)
        assert pairs[key] == value
        at = list(pairs).index(key) / (len(pairs) - 1)
        assert abs(at - sample.facts["depth"]) < 1 / len(pairs)


def test_generated_wording_is_the_official_prompt(tmp_path):
    """A generated row and the same row from a file give the same prompt."""
    for name in GENERATED:
        made = TASKS[name].build(Wanted(600, 1, 0, Pieces())).samples[0]
        question = made.turns[0].question.removeprefix("\n\n")
        line = row(context=made.context, input=question, answer=made.turns[0].references[0])
        (read,) = build(tmp_path, name.removesuffix("_generated"), [line]).samples
        assert (read.head, read.context, read.turns) == (made.head, made.context, made.turns)


@pytest.mark.parametrize("name", GENERATED)
def test_too_short(name):
    with pytest.raises(ValueError, match="a length of 40 tokens is too short"):
        TASKS[name].build(Wanted(40, 1, 0, Pieces()))


def test_official_and_generated_are_told_apart():
    assert len(OFFICIAL) == 8
    assert GENERATED == ["passkey_generated", "number_string_generated", "kv_retrieval_generated"]
    assert all("made here" in TASKS[name].about for name in GENERATED)
