"""Needle in a haystack: one number hidden at evenly spaced depths of a packaged text.

Source: Kamradt, "Needle In A Haystack - Pressure Testing LLMs", 2023; the wording is that of
RULER's single needle (arXiv 2404.06654), asked for in the singular. Runs at several lengths make
the grid of the usual heatmap: every sample says its ``length`` and ``depth``.

The default calibration of ``uncomp calibrate`` saw this text: use another one with it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import partial

from uncomp.eval.tasks.base import Built, Sample, Task, Turn, Wanted
from uncomp.eval.tasks.fitting import fit
from uncomp.eval.tasks.needles import draw_needles
from uncomp.eval.tasks.sources import builtin_names, builtin_text

NAME = "needle"
_HEAD = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the number afterwards.\n"
)
_MAX_TOKENS = 24  # seven digits, of which some tokenizers make a token each, and a full stop


def depths(count: int) -> tuple[float, ...]:
    """``count`` shares of the text from 0 (its start) to 1 (its end); the middle if one."""
    return tuple(i / (count - 1) for i in range(count)) if count > 1 else (0.5,)


def _place(words: Sequence[str], depth: float) -> int:
    """Number of words before the needle: a sentence ends there, as near to the depth as can be."""
    ends = [i for i, word in enumerate(words, 1) if re.search(r"[.!?]\W*\s", word)]
    return min((0, *ends, len(words)), key=lambda place: abs(place - depth * len(words)))


def _sample(words: Sequence[str], depth: float, index: int, wanted: Wanted, units: int) -> Sample:
    """The needle at a depth of so many words of the text, starting somewhere and going round."""
    draw = random.Random(f"{wanted.seed} {index}")
    (needle,) = draw_needles(1, draw)
    start = draw.randrange(len(words))
    body = [words[(start + i) % len(words)] for i in range(units)]
    place = _place(body, depth)
    before, after = "".join(body[:place]).rstrip(), "".join(body[place:]).strip()
    return Sample(
        task=NAME,
        id=f"{wanted.length}-{wanted.seed}-{index}",
        metric="contains",
        head=_HEAD,
        context=f"{before}{needle.sentence} {after}".strip(),
        turns=(Turn(f"\n{needle.question}", (needle.value,), _MAX_TOKENS, needle.prefix),),
        facts={"length": wanted.length, "depth": round(depth, 4)},
    )


def _build(wanted: Wanted) -> Built:
    texts, files = zip(*(builtin_text(name) for name in builtin_names()), strict=True)
    words = re.findall(r"\S+\s*", "\n\n".join(texts))
    samples = []
    units = wanted.length // 2
    for index, depth in enumerate(depths(wanted.count)):
        units, sample = fit(
            partial(_sample, words, depth, index, wanted),
            wanted.tokenizer,
            wanted.length,
            least=16,
            most=wanted.length,
            start=units,
        )
        samples.append(sample)
    return Built(samples, files)


TASKS: tuple[Task, ...] = (
    Task(
        name=NAME,
        about="one number in a novel and speeches, at evenly spaced depths",
        source="Kamradt 2023, wording of RULER (arXiv 2404.06654); generated here",
        licence="public domain (text)",
        build=_build,
    ),
)
