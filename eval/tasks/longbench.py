"""LongBench (Bai et al., ACL 2024) and its length-balanced variant LongBench-E.

Prompts, answer lengths, stop strings and the choice of metric are lm-eval's task files. Whoever
has no metric here is left out: the Chinese tasks that need word segmentation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from uncomp.eval.tasks import hub, recipes
from uncomp.eval.tasks.base import Built, DataError, Sample, Task, Turn, Wanted

_DATA_SET = "zai-org/LongBench"  # THUDM/LongBench before the organisation was renamed
_REVISION = "5e628be450b7e67fb7ae6e201bd6d8f7056f7672"
_LICENCE = "MIT (LongBench); its source data sets keep their own licences"
_SOURCE = "Bai et al. 2024, arXiv:2308.14508; prompts and settings of lm-eval"

#: data set -> what is asked
_ABOUT = {
    "narrativeqa": "questions about a story",
    "qasper": "questions about a scientific article",
    "multifieldqa_en": "questions about an article of any field",
    "hotpotqa": "two-step questions over passages of Wikipedia",
    "2wikimqa": "multi-step questions over passages of Wikipedia",
    "musique": "questions of two to four steps over passages of Wikipedia",
    "gov_report": "summary of a government report",
    "qmsum": "summary of a meeting that answers a query",
    "multi_news": "summary of several news articles",
    "trec": "type of a question, from examples",
    "triviaqa": "trivia question about a passage, after examples",
    "samsum": "summary of a dialogue, after examples",
    "lsht": "class of a Chinese news item, from examples",
    "passage_count": "number of distinct paragraphs",
    "passage_retrieval_en": "paragraph that an abstract belongs to",
    "passage_retrieval_zh": "paragraph that an abstract belongs to, in Chinese",
    "lcc": "next line of a source file",
    "repobench-p": "next line of code, with other files of the repository",
}
#: data sets that LongBench-E has too
_BALANCED = (
    *("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec"),
    *("triviaqa", "samsum", "passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
)
#: lm-eval's scoring function -> our metric
_METRICS = {
    "get_qa_f1_with_score": "f1",
    "get_rouge_with_score": "rouge_l",
    "get_classification_with_score": "classification",
    "get_count_with_score": "number_match",
    "get_retrieval_with_score": "number_match",
    "get_retrieval_zh_with_score": "number_match",
    "get_code_sim_with_score": "edit_similarity",
}
# LongBench scores the first line of these answers: models go on with examples of their own.
_FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
# Text to be continued, for which LongBench uses no chat template.
_NO_CHAT = (*_FIRST_LINE, "lcc", "repobench-p")


def _build(subset: str, wanted: Wanted) -> Built:
    """Samples of one data set; prompts longer than the wanted length are kept, for the run to cut.

    Args:
        subset: file name without its ending, ``_e`` included for LongBench-E.
    """
    recipe = recipes.recipe("longbench", f"{subset}.yaml")
    rows, data = hub.rows(
        _DATA_SET,
        "data.zip",
        _REVISION,
        wanted.data,
        member=f"data/{subset}.jsonl",
        licence=_LICENCE,
    )
    # lm-eval's copy of the data set calls the question "question", the official files "input".
    for row in rows:
        row.setdefault("question", row.get("input"))
        row.setdefault("_id", None)
    hub.require(rows, ("context", "question", "answers", "length"), data)
    chosen = hub.pick(list(enumerate(rows)), wanted.count, wanted.seed)
    samples = [_sample(subset, index, row, recipe) for index, row in chosen]
    recipes.require_room(samples, wanted)
    return Built(samples, (data, recipe.file))


def _sample(subset: str, index: int, row: Mapping[str, Any], recipe: recipes.Recipe) -> Sample:
    dataset = subset.removesuffix("_e")
    head, question = recipe.split(row)
    metric = _METRICS[recipe.scorer]
    chinese = dataset.endswith("_zh") or dataset == "lsht"
    facts = {"dataset": dataset, "characters" if chinese else "words": row["length"]}
    if dataset in _FIRST_LINE:
        facts["first_line"] = True
    if metric == "classification":
        facts["all_classes"] = row["all_classes"]
    answers = [str(answer) for answer in row["answers"]]
    if metric == "number_match":
        answers = [_number(answer) for answer in answers]
    turn = Turn(question, tuple(answers), recipe.max_tokens, stop=recipe.stop)
    return Sample(
        task=f"longbench/{subset}",
        id=str(row["_id"] or index),
        metric=metric,
        context=row["context"],
        turns=(turn,),
        head=head,
        chat=False if dataset in _NO_CHAT else None,
        facts=facts,
    )


def _number(answer: str) -> str:
    """The number in an answer such as ``Paragraph 12``."""
    found = re.search(r"\d+", answer)
    if not found:
        raise DataError(f"LongBench's answer {answer!r} should hold a number")
    return found.group()


def _task(subset: str, about: str) -> Task:
    return Task(f"longbench/{subset}", about, _SOURCE, _LICENCE, partial(_build, subset))


TASKS: tuple[Task, ...] = (
    *(_task(name, about) for name, about in _ABOUT.items()),
    *(
        _task(f"{name}_e", f"{_ABOUT[name]}; balanced over lengths (LongBench-E)")
        for name in _BALANCED
    ),
)
