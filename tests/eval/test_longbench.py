"""LongBench: prompts as lm-eval renders them, split at the context; metrics, flags and facts."""

import json
from importlib import resources
from pathlib import Path

import pytest
import yaml

from uncomp.eval.tasks import longbench, scorers
from uncomp.eval.tasks.base import Built, DataError, Wanted

# Braces and the placeholder's own name in the data must come through untouched.
CONTEXT = "First {{ question }} line.\n\nSecond line with {context} in it.\n"
QUESTION = "Which {{context}} is it?"
TASKS = {task.name.removeprefix("longbench/"): task for task in longbench.TASKS}


class Words:
    """Tokenizer with one token for each word."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0] * len(text.split())

    def decode(self, token_ids: list[int]) -> str:
        raise NotImplementedError


def answers(subset: str) -> list[str]:
    if subset.startswith("passage_retrieval"):
        return ["段落7"] if "zh" in subset else ["Paragraph 7"]
    return ["7"] if subset.startswith("passage_count") else ["7", "seven"]


def row(subset: str, index: int = 0) -> dict:
    """One row as LongBench distributes it."""
    return {
        "input": QUESTION,
        "context": f"{index} {CONTEXT}",
        "answers": answers(subset),
        "length": 9 + index,
        "dataset": subset,
        "language": "en",
        "all_classes": ["7", "seven", "eight"] if subset.startswith(("trec", "lsht")) else None,
        "_id": f"id{index}",
    }


def build(folder: Path, subset: str, count: int = 1, length: int = 2000, rows=None) -> Built:
    lines = rows or [row(subset, index) for index in range(3)]
    path = folder / "LongBench" / "data" / f"{subset}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return TASKS[subset].build(Wanted(length, count, 0, Words(), folder))


def task_file(subset: str) -> dict:
    """lm-eval's task file, read without the code under test."""
    path = resources.files("lm_eval") / "tasks" / "longbench" / f"{subset}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8").replace("!function ", ""))


@pytest.mark.parametrize("subset", TASKS)
def test_prompt_is_lm_evals(tmp_path, subset):
    sample = build(tmp_path, subset, count=3).samples[1]
    task = task_file(subset)
    (turn,) = sample.turns
    head, question = (
        part.replace("{{question}}", QUESTION) for part in task["doc_to_text"].split("{{context}}")
    )
    assert (sample.head, turn.question) == (head, question)
    assert sample.context == f"1 {CONTEXT}"
    assert turn.max_tokens == task["generation_kwargs"]["max_gen_toks"]
    assert list(turn.stop) == task["generation_kwargs"]["until"]
    assert (sample.task, sample.id) == (f"longbench/{subset}", "id1")


@pytest.mark.parametrize(
    ("subset", "metric", "chat", "first_line"),
    [
        ("narrativeqa", "f1", None, False),
        ("qasper", "f1", None, False),
        ("multifieldqa_en", "f1", None, False),
        ("hotpotqa", "f1", None, False),
        ("2wikimqa", "f1", None, False),
        ("musique", "f1", None, False),
        ("gov_report", "rouge_l", None, False),
        ("qmsum", "rouge_l", None, False),
        ("multi_news", "rouge_l", None, False),
        ("trec", "classification", False, True),
        ("triviaqa", "f1", False, True),
        ("samsum", "rouge_l", False, True),
        ("lsht", "classification", False, True),
        ("passage_count", "number_match", None, False),
        ("passage_retrieval_en", "number_match", None, False),
        ("passage_retrieval_zh", "number_match", None, False),
        ("lcc", "edit_similarity", False, False),
        ("repobench-p", "edit_similarity", False, False),
        ("trec_e", "classification", False, True),
        ("lcc_e", "edit_similarity", False, False),
        ("hotpotqa_e", "f1", None, False),
    ],
)
def test_metric_and_chat_template(tmp_path, subset, metric, chat, first_line):
    (sample,) = build(tmp_path, subset).samples
    assert (sample.metric, sample.chat) == (metric, chat)
    assert sample.facts.get("first_line", False) is first_line


@pytest.mark.parametrize("subset", TASKS)
def test_metric_exists_and_gives_the_reference_full_marks(tmp_path, subset):
    sample = build(tmp_path, subset).samples[0]
    (turn,) = sample.turns
    assert scorers.score(sample.metric, turn.references[0], turn, sample) == pytest.approx(1)
    assert scorers.score(sample.metric, "xyz", turn, sample) < 0.5


def test_facts(tmp_path):
    (sample,) = build(tmp_path, "trec", rows=[row("trec")]).samples
    assert sample.facts == {
        "dataset": "trec",
        "words": 9,
        "first_line": True,
        "all_classes": ["7", "seven", "eight"],
    }
    (balanced,) = build(tmp_path, "hotpotqa_e", rows=[row("hotpotqa_e")]).samples
    assert balanced.facts == {"dataset": "hotpotqa", "words": 9}
    (chinese,) = build(tmp_path, "lsht", rows=[row("lsht")]).samples
    assert chinese.facts["characters"] == 9


@pytest.mark.parametrize(
    ("subset", "references"),
    [
        ("passage_retrieval_en", ("7",)),
        ("passage_retrieval_zh", ("7",)),
        ("passage_count", ("7",)),
        ("qasper", ("7", "seven")),
    ],
)
def test_references(tmp_path, subset, references):
    assert build(tmp_path, subset).samples[0].turns[0].references == references


def test_number_is_required(tmp_path):
    line = row("passage_retrieval_en") | {"answers": ["no paragraph"]}
    with pytest.raises(DataError, match="'no paragraph' should hold a number"):
        build(tmp_path, "passage_retrieval_en", rows=[line])


def test_rows_of_the_hub_copy_that_lm_eval_uses(tmp_path):
    line = row("qasper")
    line["question"] = line.pop("input")
    (sample,) = build(tmp_path, "qasper", rows=[line]).samples
    assert QUESTION in sample.turns[0].question


def test_other_rows_are_refused(tmp_path):
    line = row("qasper")
    del line["context"]
    with pytest.raises(DataError, match=r"qasper\.jsonl .*: row 1 lacks context"):
        build(tmp_path, "qasper", rows=[line])


def test_data_is_recorded(tmp_path):
    built = build(tmp_path, "qasper")
    rows, task = built.data
    assert (rows.name, task.name) == ("qasper.jsonl", "qasper.yaml")
    assert len(rows.sha256) == 64
    assert rows.origin == str(tmp_path / "LongBench" / "data" / "qasper.jsonl")
    assert task.origin.startswith("lm")


def test_long_samples_are_kept_and_count_is_a_limit(tmp_path):
    lines = [row("qasper", i) | {"context": "word " * 5000} for i in range(5)]
    assert len(build(tmp_path, "qasper", count=2, rows=lines).samples) == 2
    assert len(build(tmp_path, "qasper", count=9, rows=lines).samples) == 5


def test_length_without_room_for_any_context(tmp_path):
    with pytest.raises(ValueError, match="a length of 100 tokens is too short") as caught:
        build(tmp_path, "qasper", length=100)
    least = caught.value.needed
    assert build(tmp_path, "qasper", length=least).samples
    with pytest.raises(ValueError, match="too short"):
        build(tmp_path, "qasper", length=least - 1)


def test_every_english_and_code_task_is_there():
    assert len(TASKS) == len(longbench.TASKS) == 18 + 13
    assert {"narrativeqa", "repobench-p", "qmsum", "samsum_e"} <= set(TASKS)
