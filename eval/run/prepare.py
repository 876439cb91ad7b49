"""First stage: make the samples of every task."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from uncomp.eval.run.plan import Plan, PlanError
from uncomp.eval.run.store import Store
from uncomp.eval.tasks.base import DataFile, Sample, Task, Wanted


def prepare(
    store: Store, tasks: Sequence[Task], tokenizer: Any, say: Callable[[str], None]
) -> list[Sample]:
    """The run's samples: those on disk, or made now and written.

    When the plan has grown, the samples of before are among the new ones.

    Args:
        tokenizer: of the model; generators fill lengths with it.
        say: takes progress lines.

    Raises:
        PlanError: two samples have the same name, a task made none, or its samples are others when
            more are made.
        DataError: data cannot be had.
    """
    count = store.plan.samples
    done = store.samples()
    if done is not None and store.facts().get("samples_per_task", count) == count:
        store.keep_plan()
        return done
    by_task: list[list[Sample]] = []
    data: dict[DataFile, list[str]] = {}
    for task in tasks:
        made = _of_task(task, store.plan, tokenizer, data)
        say(f"{task.name}: {len(made)} samples")
        by_task.append(made)
    # In turns, so that a run that is still going has seen every task.
    rounds = itertools.zip_longest(*by_task)
    samples = [sample for turn in rounds for sample in turn if sample is not None]
    names = [(sample.task, sample.id) for sample in samples]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PlanError(f"two samples are called {twice}: the task's generator repeats ids")
    now = {(sample.task, sample.id): sample for sample in samples}
    for before in done or ():
        if now.get((before.task, before.id)) != before:
            raise PlanError(
                f"{before.task}: with {count} samples, {before.id} is another than it was; start a "
                f"new run"
            )
    store.add_facts(
        samples_per_task=count,
        data=[{**dataclasses.asdict(file), "tasks": used} for file, used in data.items()],
        tasks=[f"{task.name} ({task.source}; {task.licence})" for task in tasks],
    )
    store.write_samples(samples)
    store.keep_plan()
    return samples


def _of_task(
    task: Task, plan: Plan, tokenizer: Any, data: dict[DataFile, list[str]]
) -> list[Sample]:
    made: dict[str, Sample] = {}
    for length in plan.lengths:
        folder = Path(plan.data) if plan.data else None
        wanted = Wanted(length, plan.samples, plan.seed, tokenizer, folder)
        built = task.build(wanted)
        for file in built.data:
            used = data.setdefault(file, [])
            used += [task.name] if task.name not in used else []
        for sample in built.samples:
            # Real documents do not depend on the wanted length: a row that comes again is the same.
            facts = {"length": length, **sample.facts}
            if made.get(sample.id, sample).context != sample.context:
                raise PlanError(
                    f"{task.name}: two different samples are called {sample.id}; the task's "
                    f"generator repeats ids"
                )
            made.setdefault(sample.id, dataclasses.replace(sample, facts=facts))
    if not made:
        raise PlanError(f"{task.name} made no sample")
    return list(made.values())
