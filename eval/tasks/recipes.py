"""Prompts of lm-eval's task files, read from the installed package and split at the context.

Nothing is retyped: a prompt is what lm-eval renders for the row, and the context is the part of it
that the template's ``{{context}}`` stands for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from uncomp.eval.tasks.base import DataError, DataFile, Sample, Wanted
from uncomp.eval.tasks.fitting import TooShortError, size
from uncomp.eval.tasks.sources import package_bytes

_LM_EVAL = "lm_eval"
# Stands for the context while a prompt is rendered; NUL occurs in no text.
_CONTEXT = "\0context\0"


@dataclass(frozen=True)
class Recipe:
    """How lm-eval asks and scores one task.

    Attributes:
        render: row -> prompt.
        max_tokens: tokens to generate at most.
        stop: strings that end the answer.
        scorer: name of lm-eval's scoring function.
        file: the task file this was read from.
    """

    render: Callable[[Mapping[str, Any]], str]
    max_tokens: int
    stop: tuple[str, ...]
    scorer: str
    file: DataFile

    def split(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """The prompt of a row: what stands before the context and what stands after it.

        Raises:
            DataError: if the task's prompt does not show the context exactly once.
        """
        before, *after = self.render({**row, "context": _CONTEXT}).split(_CONTEXT)
        if len(after) != 1:
            raise DataError(
                f"the prompt of {self.file.name} ({self.file.origin}) shows the context "
                f"{len(after)} times instead of once"
            )
        return before, after[0]


@cache
def recipe(folder: str, name: str) -> Recipe:
    """What lm-eval's task file says.

    Args:
        folder: in ``lm_eval/tasks``, e.g. ``longbench``.
        name: of the file, e.g. ``trec.yaml``.

    Raises:
        DataError: if lm-eval is not installed or has no such file.
    """
    content, file = package_bytes(_LM_EVAL, f"tasks/{folder}/{name}")
    task = _read_yaml(content)
    generation = task["generation_kwargs"]
    return Recipe(
        render=_renderer(folder, task.get("description", ""), task["doc_to_text"]),
        max_tokens=int(generation["max_gen_toks"]),
        stop=tuple(generation.get("until", ())),
        scorer=str(task.get("process_results", "")).rsplit(".", 1)[-1],
        file=file,
    )


def require_room(samples: Sequence[Sample], wanted: Wanted) -> None:
    """Check that every sample has room for its instruction, question and answer.

    Raises:
        TooShortError: with the least length that has.
    """
    bare = [size(replace(sample, context=""), wanted.tokenizer) for sample in samples]
    if max(bare, default=0) > wanted.length:
        raise TooShortError(samples[0].task, wanted.length, max(bare))


class _Function(str):
    """``module.name`` after ``!function`` in a task file."""


def _read_yaml(content: bytes) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Knows ``!function``."""

    Loader.add_multi_constructor("!function", lambda loader, suffix, node: _Function(node.value))
    return yaml.load(content, Loader)


def _renderer(folder: str, description: str, text: str) -> Callable[[Mapping[str, Any]], str]:
    from lm_eval.utils import apply_template

    if isinstance(text, _Function):
        module, _, function = text.rpartition(".")
        render = getattr(importlib.import_module(f"{_LM_EVAL}.tasks.{folder}.{module}"), function)
        return lambda row: apply_template(description, dict(row)) + render(dict(row))
    return lambda row: apply_template(description + text, dict(row))
