"""L-Eval (An et al., ACL 2024): questions about documents of 3,000 to 60,000 tokens.

Data and protocol are L-Eval's: rows that ask for human or model judges are left out, and open
questions tell the length of the reference answer (the paper's length-instruction-enhanced
evaluation). The instructions around them are our own, and summaries are scored by ROUGE-L alone, so
scores compare methods here and not with the paper's tables.

Every question is a sample of its own. L-Eval asks its questions one by one; asked in one
conversation, the later ones would see the right answers of the earlier ones.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from uncomp.eval.tasks import hub, recipes
from uncomp.eval.tasks.base import Built, DataError, DataFile, Sample, Task, Turn, Wanted

_DATA_SET = "L4NLP/LEval"
_LICENCE = "GPL-3.0 (L-Eval); its source data sets keep their own licences"
_SOURCE = "An et al. 2024, arXiv:2307.11088; instructions of this package"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Form:
    """How a kind of question is asked and scored.

    Attributes:
        metric: name of the scorer.
        max_tokens: of the answer; L-Eval itself allows 512 for everything.
        head: before the document.
        tail: after the question; ``{words}`` is the length of the reference answer.
        stop: strings that end the answer.
        all_classes: possible answers, for ``classification``.
    """

    metric: str
    max_tokens: int
    head: str = "Read the document and answer the question that follows it.\n\n"
    tail: str = ""
    stop: tuple[str, ...] = ()
    all_classes: tuple[str, ...] = ()


_CHOICE = _Form(
    "choice", 32, tail="\n\nAnswer with the letter of the right option and nothing else.\n\nAnswer:"
)
_CHOICES = _Form(
    "choice",
    32,
    tail="\n\nOne option or several are right. Answer with the letters of all right options, "
    "such as A or ABD, and nothing else.\n\nAnswer:",
)
_TRUE_FALSE = _Form(
    "classification",
    32,
    tail="\n\nGo by the document alone. Answer with True or False and nothing else.\n\nAnswer:",
    all_classes=("True", "False"),
)
_TOPIC = _Form(
    "any_reference",
    64,
    head="Here is a conversation on many topics. Remember the topics and their order.\n\n",
    tail="\n\nAnswer:",
)
# The document is a list of worked examples, each of which ends with "The answer is N".
_MATHS = _Form("last_number", 512, head="", stop=("\n\nQuestion:",))
_ANSWER = _Form("f1", 512, tail="\n\nAnswer in about {words} words.\n\nAnswer:")
_SUMMARY = _Form(
    "rouge_l",
    512,
    head="Read the document and do what is asked after it.\n\n",
    tail="\n\nWrite about {words} words.\n\nAnswer:",
)

#: data set -> folder on the hub, form, what is asked
_DATA: dict[str, tuple[str, _Form, str]] = {
    "coursera": ("Exam", _CHOICES, "multiple choice about a lecture, several may be right"),
    "quality": ("Exam", _CHOICE, "multiple choice about a story"),
    "tpo": ("Exam", _CHOICE, "multiple choice about a lecture (TOEFL)"),
    "sci_fi": ("Exam", _TRUE_FALSE, "true or false in the world of a story"),
    "topic_retrieval_longchat": ("Exam", _TOPIC, "name the n-th topic of a conversation"),
    "gsm100": ("Exam", _MATHS, "school maths after 16 worked examples"),
    "financial_qa": ("Generation", _ANSWER, "questions about an earnings call"),
    "legal_contract_qa": ("Generation", _ANSWER, "questions about a contract"),
    "multidoc_qa": ("Generation", _ANSWER, "questions about several documents"),
    "narrative_qa": ("Generation", _ANSWER, "questions about a book or script"),
    "natural_question": ("Generation", _ANSWER, "questions about articles of Wikipedia"),
    "scientific_qa": ("Generation", _ANSWER, "questions about a scientific article"),
    "gov_report_summ": ("Generation", _SUMMARY, "summary of a government report"),
    "meeting_summ": ("Generation", _SUMMARY, "summary of a meeting that answers a query"),
    "news_summ": ("Generation", _SUMMARY, "summary of several news articles"),
    "paper_assistant": ("Generation", _SUMMARY, "write or review a part of a paper"),
    "patent_summ": ("Generation", _SUMMARY, "abstract of a patent"),
    "review_summ": ("Generation", _SUMMARY, "summary of hotel reviews for an aspect"),
    "tv_show_summ": ("Generation", _SUMMARY, "summary of a television episode"),
}
_JUDGED = ("human", "llm")


def _build(name: str, wanted: Wanted) -> Built:
    """One sample for each question; longer documents are kept, for the run to cut."""
    folder, form, _ = _DATA[name]
    rows, data = hub.rows(
        _DATA_SET, f"LEval/{folder}/{name}.jsonl", "main", wanted.data, licence=_LICENCE
    )
    hub.require(rows, ("input", "instructions", "outputs", "evaluation"), data)
    samples = []
    for number, row in enumerate(rows):
        if str(row["evaluation"]).lower() not in _JUDGED:
            samples += _samples(name, number, row, form, data)
    if not samples:
        raise DataError(f"{data.name} ({data.origin}) has no question that can be scored")
    samples = hub.pick(samples, wanted.count, wanted.seed)
    recipes.require_room(samples, wanted)
    return Built(samples, (data,))


def _samples(
    name: str, number: int, row: Mapping[str, Any], form: _Form, data: DataFile
) -> list[Sample]:
    """The questions of one document."""
    questions, outputs = row["instructions"], row["outputs"]
    if len(questions) != len(outputs):
        raise DataError(
            f"{data.name} ({data.origin}): row {number + 1} has {len(questions)} instructions "
            f"but {len(outputs)} outputs"
        )
    samples = []
    for index, (question, output) in enumerate(zip(questions, outputs, strict=True)):
        reference = _reference(str(output), form)
        if not reference:
            _LOG.warning("%s: no answer in %r, question left out", data.name, output)
            continue
        tail = form.tail.format(words=len(reference.split()))
        facts: dict[str, Any] = {"dataset": name, "document": number}
        if form.all_classes:
            facts["all_classes"] = list(form.all_classes)
        samples.append(
            Sample(
                task=f"leval/{name}",
                id=f"{number}.{index}",
                metric=form.metric,
                context=row["input"],
                turns=(
                    Turn(
                        f"\n\n{question.strip()}{tail}",
                        (reference,),
                        form.max_tokens,
                        stop=form.stop,
                    ),
                ),
                head=form.head,
                facts=facts,
            )
        )
    return samples


def _reference(output: str, form: _Form) -> str:
    """What the scorer compares with; "" if there is none in the row's output."""
    if form.metric == "choice":  # "C", "ACD", or "(C) and the option's text"
        found = re.match(r"\W*([A-D]+)\b", output)
        return found.group(1) if found else ""
    if form.metric == "classification":  # "True" or "True [fact: False]", of which the first counts
        found = re.match(r"\s*(true|false)\b", output, re.IGNORECASE)
        return found.group(1).capitalize() if found else ""
    if form.metric == "last_number":
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", output)
        return numbers[-1].replace(",", "") if numbers else ""
    return output.strip()


TASKS: tuple[Task, ...] = tuple(
    Task(f"leval/{name}", about, _SOURCE, _LICENCE, partial(_build, name))
    for name, (_, _, about) in _DATA.items()
)
