"""What a task is: a named way to make samples. No engine, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that tasks use."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...


class DataError(RuntimeError):
    """Data of a task is missing or not what its hash says; the message says how to get it."""


@dataclass(frozen=True)
class DataFile:
    """Where text of a task came from.

    Attributes:
        name: file or data set name.
        sha256: of the bytes read.
        licence: SPDX name, or what the publisher says.
        origin: package and version, hub name and revision, or folder.
    """

    name: str
    sha256: str
    licence: str
    origin: str


@dataclass(frozen=True)
class Turn:
    """One question, asked after the context and the earlier turns.

    Attributes:
        question: text that follows the context (first turn) or the previous answer.
        references: right answers; what that means is up to the sample's metric. For earlier turns
            the first one stands in the conversation that later turns see.
        max_tokens: tokens to generate at most.
        prefix: first words of the answer, put in the model's mouth; not part of the prediction.
        stop: strings that end the answer.
        forced: for likelihood tasks, the text the model is made to say; no generation then.
    """

    question: str
    references: tuple[str, ...] = ()
    max_tokens: int = 32
    prefix: str = ""
    stop: tuple[str, ...] = ()
    forced: str = ""


@dataclass(frozen=True)
class Sample:
    """One document with its questions. The prompt is head + context + question.

    Attributes:
        task: full name of the task, e.g. ``ruler/niah_single_1``.
        id: unique within the task and stable for the same seed and length.
        metric: name in :data:`uncomp.eval.tasks.scorers.METRICS`.
        context: the long part, the only one that is cut if the prompt is too long.
        turns: at least one; each turn of each sample is one request.
        head: instruction before the context.
        system: system message, "" for none. Only possible with a chat template.
        chat: whether to use the chat template; None leaves it to the run.
        facts: whatever a report groups by or a metric needs (length, depth, classes, ...);
            JSON-ready.
    """

    task: str
    id: str
    metric: str
    context: str
    turns: tuple[Turn, ...]
    head: str = ""
    system: str = ""
    chat: bool | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.turns:
            raise ValueError(f"{self.task} {self.id}: a sample needs at least one turn")


@dataclass(frozen=True)
class Wanted:
    """What samples to make.

    Attributes:
        length: tokens of the whole prompt plus the answer, which the samples should fill but not
            exceed; tasks over real documents take it as the limit.
        count: samples at most.
        seed: same seed, same samples.
        tokenizer: of the model.
        data: folder with data sets the task cannot get elsewhere; None = built-in, packages, hub.
    """

    length: int
    count: int
    seed: int
    tokenizer: Tokenizer
    data: Path | None = None


@dataclass(frozen=True)
class Built:
    """Samples and the data they were made from."""

    samples: Sequence[Sample]
    data: tuple[DataFile, ...] = ()


@dataclass(frozen=True)
class Task:
    """A named task.

    Attributes:
        name: ``family/task``, or only the family if it has one task.
        about: one line for ``uncomp eval --list``.
        source: paper or repository, and the package that generates or scores.
        licence: of the data.
        build: makes the samples.

    ``build`` raises :class:`DataError` if its data cannot be had and ``ValueError`` if the wanted
    length is too short for the task, saying the least possible.
    """

    name: str
    about: str
    source: str
    licence: str
    build: Callable[[Wanted], Built]
