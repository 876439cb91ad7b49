"""L-Eval: one sample for each question; forms, references and what is left out."""

import json
import logging
from pathlib import Path

import pytest

from uncomp.eval.tasks import leval, scorers
from uncomp.eval.tasks.base import Built, DataError, Wanted

TASKS = {task.name.removeprefix("leval/"): task for task in leval.TASKS}
DOCUMENT = "A long {document}\nof two lines."


class Words:
    """Tokenizer with one token for each word."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0] * len(text.split())

    def decode(self, token_ids: list[int]) -> str:
        raise NotImplementedError


def row(outputs: list[str], evaluation: str = "exam", **fields) -> dict:
    """One row as L-Eval distributes it: a document and its questions."""
    return {
        "instructions": [f"Question {i}. {{words}}?\nA. x\nB. y" for i in range(len(outputs))],
        "outputs": outputs,
        "input": DOCUMENT,
        "source": "test",
        "evaluation": evaluation,
    } | fields


def build(folder: Path, name: str, rows: list[dict], count: int = 99, length: int = 2000) -> Built:
    path = folder / "LEval" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in rows), encoding="utf-8")
    return TASKS[name].build(Wanted(length, count, 0, Words(), folder))


@pytest.mark.parametrize("name", TASKS)
def test_every_question_is_a_sample(tmp_path, name):
    output = "True" if name == "sci_fi" else "A 12"
    built = build(tmp_path, name, [row([output]), row([output] * 2)])
    assert [sample.id for sample in built.samples] == ["0.0", "1.0", "1.1"]
    assert [sample.facts["document"] for sample in built.samples] == [0, 1, 1]
    for sample in built.samples:
        assert sample.task == f"leval/{name}"
        assert sample.context == DOCUMENT
        assert sample.chat is None
        (turn,) = sample.turns
        number = sample.id.split(".")[1]
        assert turn.question.startswith(f"\n\nQuestion {number}. {{words}}?\nA. x\nB. y")
        assert turn.prefix == ""


@pytest.mark.parametrize(
    ("name", "metric", "max_tokens"),
    [
        ("coursera", "choice", 32),
        ("quality", "choice", 32),
        ("tpo", "choice", 32),
        ("sci_fi", "classification", 32),
        ("topic_retrieval_longchat", "any_reference", 64),
        ("gsm100", "last_number", 512),
        ("multidoc_qa", "f1", 512),
        ("natural_question", "f1", 512),
        ("gov_report_summ", "rouge_l", 512),
        ("paper_assistant", "rouge_l", 512),
    ],
)
def test_metric(tmp_path, name, metric, max_tokens):
    output = "True" if name == "sci_fi" else "A 12"
    (sample,) = build(tmp_path, name, [row([output])]).samples
    assert (sample.metric, sample.turns[0].max_tokens) == (metric, max_tokens)


@pytest.mark.parametrize(
    ("name", "output", "reference"),
    [
        ("tpo", "C", "C"),
        ("coursera", "ACD", "ACD"),
        ("quality", "(C) Humans are capable", "C"),
        ("quality", "B. Humans", "B"),
        ("sci_fi", "true [fact: False]", "True"),
        ("sci_fi", "False", "False"),
        ("gsm100", "18", "18"),
        ("gsm100", "16 - 3 - 4 = 9 eggs\nThe answer is 1,018.5", "1018.5"),
        ("topic_retrieval_longchat", " The role of music ", "The role of music"),
        ("multidoc_qa", "Take a bus.\n", "Take a bus."),
    ],
)
def test_reference(tmp_path, name, output, reference):
    (sample,) = build(tmp_path, name, [row([output])]).samples
    assert sample.turns[0].references == (reference,)


def test_question_without_a_usable_answer_is_left_out_aloud(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        built = build(tmp_path, "tpo", [row(["B", "the second"])])
    assert len(built.samples) == 1
    assert "no answer in 'the second', question left out" in caplog.text


def test_open_questions_tell_the_length(tmp_path):
    (sample,) = build(tmp_path, "multidoc_qa", [row(["Take the bus now."])]).samples
    assert sample.turns[0].question.endswith("Answer in about 4 words.\n\nAnswer:")


@pytest.mark.parametrize("name", TASKS)
def test_metric_exists_and_gives_the_reference_full_marks(tmp_path, name):
    output = "True" if name == "sci_fi" else "A 12"
    (sample,) = build(tmp_path, name, [row([output])]).samples
    (turn,) = sample.turns
    assert scorers.score(sample.metric, turn.references[0], turn, sample) == pytest.approx(1)
    assert scorers.score(sample.metric, "nothing like it", turn, sample) == 0


def test_classes_for_true_or_false(tmp_path):
    (sample,) = build(tmp_path, "sci_fi", [row(["True"])]).samples
    assert sample.facts == {"dataset": "sci_fi", "document": 0, "all_classes": ["True", "False"]}


def test_rows_for_judges_are_left_out(tmp_path):
    rows = [row(["a"], "human"), row(["b"], "LLM"), row(["c"], "f1")]
    built = build(tmp_path, "scientific_qa", rows)
    assert [sample.turns[0].references for sample in built.samples] == [("c",)]
    with pytest.raises(DataError, match="no question that can be scored"):
        build(tmp_path, "scientific_qa", rows[:2])


def test_questions_without_answers_are_refused(tmp_path):
    with pytest.raises(DataError, match="row 1 has 1 instructions but 2 outputs"):
        build(tmp_path, "tpo", [row(["A", "B"], instructions=["one"])])


def test_other_rows_are_refused(tmp_path):
    with pytest.raises(DataError, match="row 1 lacks instructions, outputs"):
        build(tmp_path, "tpo", [{"input": "", "evaluation": "exam"}])


def test_data_is_recorded_and_count_is_a_limit(tmp_path):
    built = build(tmp_path, "tpo", [row(["A"] * 10)], count=4)
    assert len(built.samples) == 4
    (data,) = built.data
    assert data.name == "tpo.jsonl"
    assert len(data.sha256) == 64
    assert data.origin == str(tmp_path / "LEval" / "tpo.jsonl")


def test_too_short(tmp_path):
    with pytest.raises(ValueError, match="a length of 20 tokens is too short"):
        build(tmp_path, "tpo", [row(["A"])], length=20)
