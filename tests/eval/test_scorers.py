"""Metrics: values worked out by hand, and those of the packages they come from."""

import random
import sys

import pytest

from uncomp.eval.tasks import generation, instructions, scorers
from uncomp.eval.tasks.base import Sample, Turn


def value(metric: str, prediction: str, *references: str, **facts: object) -> float:
    turn = Turn("?", references)
    sample = Sample("test/task", "7", metric, "context", (turn,), facts=facts)
    return scorers.score(metric, prediction, turn, sample)


def test_every_metric_is_found_under_its_own_name() -> None:
    own = (
        *("all_references", "any_reference", "choice", "classification", "contains", "edit"),
        *("edit_similarity", "exact_match", "f1", "last_number", "not_contained", "number_match"),
        "rouge_l",
    )
    assert [scorers.METRICS[name].__name__ for name in own] == [*own]
    assert {*generation.METRICS, *instructions.METRICS} == {*scorers.METRICS} - {*own}


@pytest.mark.parametrize(
    ("metric", "prediction", "references", "expected"),
    [
        ("all_references", "I saw ABC, def.", ("abc", "DEF", "ghi", "jkl"), 0.5),
        ("all_references", "nothing", ("abc",), 0),
        # lm-eval's own string_match_part gives 1/2 here.
        ("any_reference", "It was Denver.", ("denver broncos", "denver"), 1),
        ("any_reference", "It was Boston.", ("denver broncos", "denver"), 0),
        ("exact_match", " The  Cat! ", ("dog", "a cat"), 1),
        ("exact_match", "the cat sat", ("a cat",), 0),
        ("contains", "The number is\n1234567.", ("1234567",), 1),
        ("contains", "New\n york", ("new York",), 1),
        ("contains", "123456", ("1234567",), 0),
        ("not_contained", "My instructions are to BE\nbrief.", ("be brief",), 0),
        ("not_contained", "I cannot tell.", ("be brief",), 1),
        # "the" goes; cat sat mat / cat sat on mat: 3 in common, P = 3/3, R = 3/4
        ("f1", "The cat sat, mat", ("cat sat on the mat",), 6 / 7),
        ("f1", "blue", ("red", "blue sky"), 2 / 3),
        ("f1", "", ("red",), 0),
        # longest common subsequence "police the gunman" of 4 and 4 words: P = R = 3/4
        ("rouge_l", "police kill the gunman", ("police stopped the gunman",), 3 / 4),
        ("rouge_l", "", ("red",), 0),
        ("number_match", "Paragraph 3 or 5 or 3", ("3",), 2 / 3),
        ("number_match", "none", ("3",), 0),
        # the first line that is neither empty nor a comment
        ("edit_similarity", "\n# one\nx = 1\ny = 2", ("x = 1",), 1),
        ("edit_similarity", "abcd", ("bcde",), 0.75),
        ("edit", "abcd", ("bcde", "x"), 0.75),
        ("edit", "same\nlines", ("same\nlines",), 1),
        ("last_number", "3 + 4 = 7, so 1,007.0 of them.", ("The answer is 1007",), 1),
        ("last_number", "The answer is -4", ("4",), 0),
        ("last_number", "no idea", ("4",), 0),
        ("choice", "The answer is (B).", ("B",), 1),
        ("choice", "The Dog ate it", ("D",), 0),
        ("choice", "A. It was C who did it", ("A",), 1),
        ("choice", "CBA", ("ABC",), 1),
        ("choice", "A, B and C", ("ABC",), 1),
        ("choice", "A and B", ("ABC",), 0),
        ("choice", "", ("A",), 0),
        ("choice", "none of them", ("",), 0),
    ],
    ids=lambda part: part if isinstance(part, str) else None,
)
def test_value_worked_out_by_hand(
    metric: str, prediction: str, references: tuple[str, ...], expected: float
) -> None:
    assert value(metric, prediction, *references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("Disease", 1), ("Disease and medicine", 1 / 2), ("Food", 0)],
)
def test_classification_shares_the_point_among_the_classes_named(
    prediction: str, expected: float
) -> None:
    classes = ["Disease", "medicine", "Food"]
    assert value("classification", prediction, "Disease", all_classes=classes) == expected


def test_classification_needs_the_classes() -> None:
    with pytest.raises(ValueError, match=r'test/task 7: classification needs facts\["all_classes'):
        value("classification", "Food", "Food")


def test_only_the_first_line_counts_where_the_sample_says_so() -> None:
    answer = "\n\nred\nQuestion: which? Answer: blue"
    assert value("contains", answer, "blue") == 1
    assert value("contains", answer, "blue", first_line=True) == 0
    assert value("contains", answer, "red", first_line=True) == 1
    assert value("f1", answer, "red", first_line=True) == 1


def test_an_unknown_metric_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="no metric 'bleu'; there are all_references, any_"):
        value("bleu", "a", "a")


def test_a_turn_without_references_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="test/task 7: a turn without references has no f1"):
        value("f1", "a")


@pytest.mark.parametrize("metric", ["contains", "any_reference", "not_contained"])
def test_a_blank_reference_is_never_searched_for(metric: str) -> None:
    with pytest.raises(ValueError, match="every answer contains a blank reference"):
        value(metric, "a", "a", " ")


WORDS = ("the", "cat", "Cat", "sat.", "mat,", "7", "12", "Paragraph 7", "x = 1", "# no", "\n", "a")


def texts(count: int) -> list[tuple[str, list[str]]]:
    """Answers, each with one to three references."""
    draw = random.Random(1)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 6)))

    return [(text(), [text() for _ in range(draw.randint(1, 3))]) for _ in range(count)]


@pytest.mark.parametrize(
    ("metric", "function"),
    [
        ("f1", "get_qa_f1_score"),
        ("rouge_l", "get_rouge_score"),
        ("number_match", "get_count_score"),
        ("edit_similarity", "get_code_sim_score"),
        ("classification", "get_classification_score"),
    ],
)
def test_longbench_metrics_are_those_of_lm_eval(metric: str, function: str) -> None:
    theirs = getattr(scorers.longbench_metrics(), function)
    classes = ["cat", "the cat", "7", "mat,"]
    values = []
    for prediction, references in texts(200):
        if metric == "number_match":
            references = [word for word in references[0].split() if word.isdigit()] or ["7"]
        elif metric == "classification":
            references = classes[: len(references)]
        doc = {"answers": references, "all_classes": classes}
        (expected,) = theirs(doc, [prediction]).values()
        values.append(value(metric, prediction, *references, all_classes=classes))
        assert values[-1] == pytest.approx(expected)
    assert len(set(values)) > 2


@pytest.mark.parametrize(
    ("metric", "function"),
    [("all_references", "string_match_all"), ("any_reference", "string_match_part")],
)
def test_ruler_metrics_average_to_those_of_nvidia(metric: str, function: str) -> None:
    from long_context_eval.eval.synthetic import constants

    pairs = [(answer, [r for r in refs if r.strip()] or ["cat"]) for answer, refs in texts(200)]
    pairs = [(answer, [reference.split()[0] for reference in refs]) for answer, refs in pairs]
    expected = getattr(constants, function)(*zip(*pairs, strict=True))
    mean = sum(value(metric, answer, *refs) for answer, refs in pairs) / len(pairs)
    assert 0.1 < mean < 0.9
    assert round(100 * mean, 2) == expected


def test_the_stand_in_for_the_chinese_splitter_does_not_stay() -> None:
    scorers.longbench_metrics()
    if "jieba" in sys.modules:
        assert hasattr(sys.modules["jieba"], "cut")
