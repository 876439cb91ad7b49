"""The user's own samples: a file of JSON lines.

One object a line::

    {"prompt": TEXT}                         the whole prompt, or
    {"context": TEXT, "question": TEXT}      a long text (cut if it must be) and what follows it

with, all of them optional, ``references`` (or ``answers``): text or list of texts; ``metric``: a
name in :data:`uncomp.eval.tasks.scorers.METRICS`; ``max_tokens``; ``id``; ``system``; ``facts``:
an object with whatever a metric needs or you want to keep. Rows without references are judged
against what the model says with its full cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uncomp.eval.tasks.base import DataFile, Sample, Turn
from uncomp.eval.tasks.scorers import METRICS

TASK = "data"
#: metric of rows with references that name none: 0 or 1, whether the answer contains one
METRIC = "contains"
#: metric of rows without references, until the full cache's answer is known
OPEN = "answer of the full cache"
_FIELDS = (
    "prompt",
    "context",
    "question",
    "references",
    "answers",
    "metric",
    "max_tokens",
    "id",
    "system",
    "facts",
)


class RowsError(ValueError):
    """Rows that cannot be used; the message says the file and the line."""


@dataclass(frozen=True)
class Rows:
    """A file of samples.

    Attributes:
        samples: one per row, in the order of the file; those without references have metric
            :data:`OPEN`.
        file: name and hash.
    """

    samples: tuple[Sample, ...]
    file: DataFile


def read_rows(path: Path, max_tokens: int = 64, metric: str = METRIC) -> Rows:
    """Read a file.

    Args:
        max_tokens, metric: of rows that do not say.

    Raises:
        RowsError: it cannot be read, has no rows, or a row is not as described above.
    """
    if metric not in METRICS:
        raise RowsError(f"no metric {metric!r}; there are {', '.join(sorted(METRICS))}")
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RowsError(f"cannot read {path} as UTF-8 text: {error}") from error
    samples: dict[str, Sample] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            sample = _sample(_row(line), number, max_tokens, metric)
            if sample.id in samples:
                raise RowsError(f"id {sample.id!r} is that of an earlier row")
        except RowsError as error:
            raise RowsError(f"{path}, line {number}: {error}") from error
        samples[sample.id] = sample
    if not samples:
        raise RowsError(f"{path} has no rows: one JSON object a line is needed")
    digest = hashlib.sha256(content).hexdigest()
    return Rows(tuple(samples.values()), DataFile(path.name, digest, "the user's", "--data"))


def _row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise RowsError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise RowsError(f"must be an object such as {{'prompt': '...'}}, got {line[:60]!r}")
    unknown = sorted(set(row) - set(_FIELDS))
    if unknown:
        raise RowsError(
            f"unknown fields {unknown}; allowed: {', '.join(_FIELDS)} (anything else can stand in "
            f"facts)"
        )
    return row


def _sample(row: Mapping[str, Any], number: int, max_tokens: int, metric: str) -> Sample:
    context, question = _texts(row)
    references = _references(row)
    if not references and "metric" in row:
        raise RowsError("a metric needs references; without both the full cache is the measure")
    metric = _text(row, "metric") or metric
    if metric not in METRICS:
        raise RowsError(f"no metric {metric!r}; there are {', '.join(sorted(METRICS))}")
    limit = row.get("max_tokens", max_tokens)
    if type(limit) is not int or limit < 1:
        raise RowsError(f"max_tokens={limit!r}: must be a whole number of at least 1")
    facts = row.get("facts", {})
    if not isinstance(facts, dict):
        raise RowsError(f"facts={facts!r}: must be an object")
    name = row.get("id", number)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise RowsError(f"id={name!r}: must be text or a whole number")
    return Sample(
        TASK,
        str(name),
        metric if references else OPEN,
        context,
        (Turn(question, references, limit),),
        system=_text(row, "system"),
        facts=facts,
    )


def _texts(row: Mapping[str, Any]) -> tuple[str, str]:
    prompt, context, question = (_text(row, n) for n in ("prompt", "context", "question"))
    if prompt and not (context or question):
        return prompt, ""
    if prompt or not context:
        raise RowsError("give either prompt, or context and question")
    return context, question if not question or context.endswith("\n") else f"\n\n{question}"


def _references(row: Mapping[str, Any]) -> tuple[str, ...]:
    given = [name for name in ("references", "answers") if row.get(name) is not None]
    if not given:
        return ()
    if len(given) == 2:
        raise RowsError("references and answers mean the same: give one of them")
    value = row[given[0]]
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(r, str) for r in found):
        raise RowsError(f"{given[0]}={value!r}: must be text or a list of texts, not empty")
    if not all(reference.strip() for reference in found):
        raise RowsError(f"{given[0]}={value!r}: blank text is contained in every answer")
    return tuple(found)


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name) or ""
    if not isinstance(value, str):
        raise RowsError(f"{name}={value!r}: must be text")
    return value
