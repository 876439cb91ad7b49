"""Every task there is, by name."""

from __future__ import annotations

from collections.abc import Sequence

from uncomp.eval.tasks import (
    generation,
    infinitebench,
    instructions,
    kv_retrieval,
    leval,
    likelihood,
    longbench,
    multiturn,
    needle,
    ruler,
)
from uncomp.eval.tasks.base import Task

_MODULES = (
    ruler,
    needle,
    kv_retrieval,
    longbench,
    leval,
    infinitebench,
    multiturn,
    instructions,
    generation,
    likelihood,
)

#: name -> task
TASKS: dict[str, Task] = {task.name: task for module in _MODULES for task in module.TASKS}


def family(name: str) -> str:
    """What stands before the slash of a task's name: ``ruler`` of ``ruler/vt``."""
    return name.split("/")[0]


def find(names: Sequence[str]) -> list[Task]:
    """The tasks meant by names of tasks and families, each once, in the order asked for.

    Args:
        names: e.g. ``ruler`` (all its tasks), ``ruler/vt``, ``needle``.

    Raises:
        ValueError: for a name that is neither, saying what there is.
    """
    families: dict[str, list[str]] = {}
    for name in TASKS:
        families.setdefault(family(name), []).append(name)
    found: dict[str, Task] = {}
    for asked in names:
        if asked not in TASKS and asked not in families:
            # A family's tasks are listed only when one of them was asked for.
            there = families.get(family(asked), [*families])
            raise ValueError(f"no task or family {asked!r}; there are {', '.join(there)}")
        for name in [asked] if asked in TASKS else families[asked]:
            found[name] = TASKS[name]
    return list(found.values())
