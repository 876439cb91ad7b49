"""The facts of a run, a plain mapping, as the pages and the rows read them.

Known keys, all optional; whatever else there is, is shown as it is:

=======================  ===========================================================================
``title``                heading of the report
``model``, ``revision``  name or folder; commit of the hub
``data``                 list of mappings ``name``, ``sha256``, ``licence``, ``origin`` and, if not
                         of all tasks, ``tasks``: names of the tasks made from it
``methods``              method -> its settings, JSON-ready
``seeds``                one number, a list, or a mapping of what is seeded
``versions``             package -> version
``machine``              one line or a mapping
``commit``, ``date``     of this repository; ISO
``command``              the line that reproduces the run
``kv_bytes_per_token``   of the full cache, over all layers; turns kept ratios into bytes
=======================  ===========================================================================
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

MISSING = "not recorded"
RUN = ("model", "revision", "machine", "versions", "seeds", "commit", "date", "kv_bytes_per_token")
ELSEWHERE = ("title", "data", "methods", "command")


def line(value: Any) -> str:
    """A value in one line: text as it is, mappings as ``key value`` pairs."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {line(inner)}" for key, inner in value.items()) or MISSING
    if isinstance(value, Sequence):
        return ", ".join(line(inner) for inner in value) or MISSING
    return str(value)


def run_facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How it was run: the known facts, present or not, then all others."""
    others = [key for key in facts if key not in RUN + ELSEWHERE]
    return [(key.replace("_", " "), line(facts.get(key))) for key in (*RUN, *others)]


def data_files(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The data files as mappings; :class:`uncomp.eval.tasks.base.DataFile` is taken too."""
    return [
        asdict(entry) if is_dataclass(entry) and not isinstance(entry, type) else dict(entry)
        for entry in facts.get("data") or ()
    ]


def data_hash(facts: Mapping[str, Any], task: str | None = None) -> str:
    """A SHA-256 for the data of a task, or of all of them: of ``name sha256`` lines, sorted.

    Returns:
        64 hex digits, or "" if no data file is recorded for it.
    """
    lines = sorted(
        f"{entry.get('name', '')} {entry.get('sha256', '')}\n"
        for entry in data_files(facts)
        if task is None or not entry.get("tasks") or task in entry["tasks"]
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else ""


def methods(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings of every method as indented JSON."""
    found = facts.get("methods") or {}
    return [
        (name, json.dumps(settings, indent=2, default=str, ensure_ascii=False))
        for name, settings in found.items()
    ]
