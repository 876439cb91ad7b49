"""What an answer is worth: metrics of the benchmarks, each one number in [0, 1] for one answer.

RULER's are NVIDIA's functions (lm-eval's own copy of ``string_match_part`` averages over the
references where RULER takes the best), LongBench's are lm-eval's.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from uncomp.eval.tasks import generation, instructions
from uncomp.eval.tasks.base import DataError, Sample, Turn
from uncomp.eval.tasks.sources import INSTALL

Metric = Callable[[str, Turn, Sample], float]

_SEARCHES = ("all_references", "any_reference", "contains", "not_contained")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def score(metric: str, prediction: str, turn: Turn, sample: Sample) -> float:
    """Value of an answer in [0, 1].

    Where the sample's ``facts["first_line"]`` is true, only the first line that is not empty counts
    (LongBench: models go on with examples of their own).

    Raises:
        ValueError: for a metric that is not in :data:`METRICS`, without references, or with a blank
            one where the answer is searched for it.
        DataError: if the package of the metric is missing.
    """
    if metric not in METRICS:
        raise ValueError(f"no metric {metric!r}; there are {', '.join(sorted(METRICS))}")
    if not turn.references:
        raise ValueError(f"{sample.task} {sample.id}: a turn without references has no {metric}")
    if metric in _SEARCHES and not all(reference.strip() for reference in turn.references):
        raise ValueError(
            f"{sample.task} {sample.id}: every answer contains a blank reference; leave it out of "
            f"{turn.references!r}"
        )
    if sample.facts.get("first_line"):
        prediction = prediction.lstrip("\n").split("\n")[0]
    return METRICS[metric](prediction, turn, sample)


# -- RULER --


@cache
def _ruler() -> ModuleType:
    try:
        from long_context_eval.eval.synthetic import constants
    except ImportError as error:
        raise DataError(f"RULER's metrics cannot be imported ({error}): {INSTALL}") from error
    return constants


def all_references(prediction: str, turn: Turn, sample: Sample) -> float:
    """Share of the references that the answer contains, in any case (RULER: string_match_all)."""
    found = _ruler().string_match_all_per_sample([prediction], [turn.references])
    return float(found[0]) / 100


def any_reference(prediction: str, turn: Turn, sample: Sample) -> float:
    """Whether the answer contains a reference, in any case (RULER: string_match_part)."""
    found = _ruler().string_match_part_per_sample([prediction], [turn.references])
    return float(found[0]) / 100


# -- LongBench --


@cache
def longbench_metrics() -> ModuleType:
    """lm-eval's LongBench metrics.

    Their module imports jieba, a splitter of Chinese words that only the Chinese metrics call;
    where it is not installed, an empty module stands in for it during the import.
    """
    stand_in = None
    try:
        import jieba  # noqa: F401
    except ImportError:
        stand_in = sys.modules["jieba"] = ModuleType("jieba")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using slow pure-python SequenceMatcher")
            from lm_eval.tasks.longbench import metrics
    except ImportError as error:
        raise DataError(f"LongBench's metrics cannot be imported ({error}): {INSTALL}") from error
    finally:
        if stand_in is not None:
            del sys.modules["jieba"]
    return metrics


def _best(function: str, prediction: str, turn: Turn, **facts: Any) -> float:
    """LongBench's value for the reference that suits best."""
    compare = getattr(longbench_metrics(), function)
    return max(float(compare(prediction, reference, **facts)) for reference in turn.references)


def f1(prediction: str, turn: Turn, sample: Sample) -> float:
    """F1 of the words in common, without case, punctuation and articles (LongBench: qa_f1)."""
    return _best("qa_f1_score", prediction.strip(), turn)


def rouge_l(prediction: str, turn: Turn, sample: Sample) -> float:
    """ROUGE-L F1 as LongBench takes it; 0 for an empty answer."""
    return _best("rouge_score", prediction.strip(), turn)


def classification(prediction: str, turn: Turn, sample: Sample) -> float:
    """1 over the number of classes named, if the right one is among them (LongBench: trec).

    The classes are the sample's ``facts["all_classes"]``.

    Raises:
        ValueError: if the sample has none.
    """
    classes = sample.facts.get("all_classes")
    if not classes:
        raise ValueError(f'{sample.task} {sample.id}: classification needs facts["all_classes"]')
    return _best("classification_score", prediction.strip(), turn, all_classes=classes)


def number_match(prediction: str, turn: Turn, sample: Sample) -> float:
    """Share of the answer's numbers that are the right one (LongBench: count and retrieval).

    A reference is the number alone, e.g. ``7`` and not ``Paragraph 7``.
    """
    return _best("count_score", prediction.strip(), turn)


def edit_similarity(prediction: str, turn: Turn, sample: Sample) -> float:
    """Similarity of the answer's first line of code with the reference (LongBench: code_sim)."""
    return _best("code_sim_score", prediction, turn)


# -- plain --


def exact_match(prediction: str, turn: Turn, sample: Sample) -> float:
    """Whether the answer is a reference, without case, punctuation, articles and spacing."""
    normal = longbench_metrics().normalize_answer
    return float(normal(prediction) in {normal(reference) for reference in turn.references})


def contains(prediction: str, turn: Turn, sample: Sample) -> float:
    """Whether the answer contains a reference, without case and whatever the spacing."""
    said = _plain(prediction)
    return float(any(_plain(reference) in said for reference in turn.references))


def not_contained(prediction: str, turn: Turn, sample: Sample) -> float:
    """Whether the answer keeps the references to itself: 1 if it contains none of them."""
    return 1.0 - contains(prediction, turn, sample)


def edit(prediction: str, turn: Turn, sample: Sample) -> float:
    """Similarity of the whole answer with the best reference: matching characters (difflib)."""
    from difflib import SequenceMatcher

    return max(
        SequenceMatcher(None, prediction.strip(), reference.strip(), autojunk=False).ratio()
        for reference in turn.references
    )


def last_number(prediction: str, turn: Turn, sample: Sample) -> float:
    """Whether the answer's last number has the value of a reference (school maths)."""
    said = _NUMBER.findall(prediction)
    right = {_value(number) for text in turn.references for number in _NUMBER.findall(text)[-1:]}
    return float(bool(said) and _value(said[-1]) in right)


def choice(prediction: str, turn: Turn, sample: Sample) -> float:
    """Whether the chosen options are the right ones; a reference is letters such as B or ACD.

    Letters stand alone or next to each other. For a single right option the first letter counts,
    for several all of the first line. (L-Eval's script takes any capital A to D, that of "The Dog"
    too, and A where there is none: chance, that is, which is not measured here.)
    """
    said = re.findall(r"\b[A-D]+\b", prediction)
    line = re.findall(r"\b[A-D]+\b", prediction.strip().split("\n")[0])
    for reference in turn.references:
        right = set(reference.strip())
        chosen = set("".join(line)) if len(right) > 1 else set("".join(said[:1]))
        if chosen and chosen == right:
            return 1.0
    return 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _value(number: str) -> float:
    return float(number.replace(",", ""))


_OWN: tuple[Callable[..., float], ...] = (
    all_references,
    any_reference,
    choice,
    classification,
    contains,
    edit,
    edit_similarity,
    exact_match,
    f1,
    last_number,
    not_contained,
    number_match,
    rouge_l,
)

#: name -> metric; higher is better for all of them
METRICS: dict[str, Metric] = {
    **{metric.__name__: metric for metric in _OWN},
    **generation.METRICS,
    **instructions.METRICS,
}
