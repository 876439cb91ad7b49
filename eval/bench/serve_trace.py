"""Recorded traffic: files with an arrival and the lengths, or the text, of every request.

=================  ================================================================================
What               Columns (the first that is there counts)
=================  ================================================================================
arrival            ``arrival``, ``timestamp``, ``TIMESTAMP``: a number in the unit given, or a date
prompt             ``prompt`` (text), or a length: ``prompt_tokens``, ``input_length``,
                   ``ContextTokens``
answer             ``output_tokens``, ``output_length``, ``GeneratedTokens``
shared beginnings  ``hash_ids``, optional: one id per block of the prompt, same id, same tokens
=================  ================================================================================

That covers Mooncake's traces (JSON lines, milliseconds, blocks of 512 tokens), the anonymised
Qwen traces (seconds, blocks of 16) and Azure's LLM inference traces (CSV with dates).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

_ARRIVAL = ("arrival", "timestamp", "TIMESTAMP")
_PROMPT = ("prompt_tokens", "input_length", "ContextTokens")
_OUTPUT = ("output_tokens", "output_length", "GeneratedTokens")
UNITS = {"s": 1.0, "ms": 1e-3}


@dataclass(frozen=True)
class Arrival:
    """One request of a trace.

    Attributes:
        seconds: after the first request.
        prompt: text, or "" where only the length is known.
        prompt_tokens: length; 0 where the text is given.
        output_tokens: of the answer.
        blocks: ids of the prompt's blocks of ``block`` tokens; empty: nothing is shared.
        block: tokens per id.
    """

    seconds: float
    prompt: str
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    block: int = 0


def read(path: Path, unit: str = "s", block: int = 512, limit: int | None = None) -> list[Arrival]:
    """The requests of a trace, by arrival; the first arrives at 0.

    Args:
        path: ``.csv``, else JSON lines.
        unit: of arrivals that are numbers, ``s`` or ``ms``.
        block: tokens per entry of ``hash_ids``.
        limit: only the first so many.

    Raises:
        ValueError: a line is not as above; the message names it. Nothing is left out silently.
        OSError: the file cannot be read.
    """
    if unit not in UNITS:
        raise ValueError(f"unit {unit!r}: must be one of {list(UNITS)}")
    found: list[Arrival] = []
    for number, record in _records(path):
        try:
            found.append(_arrival(record, UNITS[unit], block))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"{path} holds no requests")
    found.sort(key=lambda request: request.seconds)
    first = found[0].seconds
    shifted = [
        Arrival(r.seconds - first, r.prompt, r.prompt_tokens, r.output_tokens, r.blocks, r.block)
        for r in found
    ]
    return shifted[:limit]


def _records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open(path, encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            yield from enumerate(csv.DictReader(file), 2)  # the header is line 1
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
                if not isinstance(record, dict):
                    raise ValueError(f"{path}, line {number}: must be an object, got {line[:60]!r}")
                yield number, record


def _arrival(record: Mapping[str, Any], unit: float, block: int) -> Arrival:
    seconds = _seconds(_first(record, _ARRIVAL), unit)
    output = _count(record, _OUTPUT)
    prompt = record.get("prompt") or ""
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be text, got {prompt!r}")
    if prompt:
        return Arrival(seconds, prompt, 0, output)
    length = _count(record, _PROMPT)
    blocks = tuple(record.get("hash_ids") or ())
    if not blocks:
        return Arrival(seconds, "", length, output)
    if len(blocks) != math.ceil(length / block):
        raise ValueError(
            f"{len(blocks)} hash_ids for {length} tokens do not fit blocks of {block}: give "
            f"--trace-block (Mooncake: 512, Qwen: 16)"
        )
    return Arrival(seconds, "", length, output, blocks, block)


def _first(record: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    for name in names:
        if record.get(name) not in (None, ""):
            return record[name]
    raise ValueError(f"needs one of {list(names)}, has {list(record)}")


def _count(record: Mapping[str, Any], names: tuple[str, ...]) -> int:
    value = _first(record, names)
    try:
        count = int(value)
    except (TypeError, ValueError):
        count = 0
    if count < 1 or float(value) != count:
        raise ValueError(f"{'/'.join(names)} must be a whole number of at least 1, got {value!r}")
    return count


def _seconds(value: Any, unit: float) -> float:
    try:
        seconds = float(value) * unit
    except (TypeError, ValueError):
        seconds = _date(str(value))
    if not math.isfinite(seconds):
        raise ValueError(f"arrival must be a number or a date, got {value!r}")
    return seconds


def _date(text: str) -> float:
    whole, _, fraction = text.partition(".")
    digits = fraction[: len(fraction) - len(fraction.lstrip("0123456789"))]
    try:
        moment = datetime.fromisoformat(whole + fraction[len(digits) :])
    except ValueError as error:
        raise ValueError(f"arrival must be a number or a date, got {text!r}") from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)  # any zone does: only differences count
    # Azure writes seven digits, of which datetime would take six.
    return moment.timestamp() + (float(f"0.{digits}") if digits else 0.0)
