"""A run's folder. Stages append to it, so a killed run goes on where it was.

``plan.json``, ``facts.json`` (machine, versions, engine, data), ``samples.jsonl``,
``predictions.jsonl``, ``scores.jsonl``, ``report/``.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from uncomp.eval.run.plan import Plan, PlanError
from uncomp.eval.run.records import Case, Prediction, Scored
from uncomp.eval.tasks.base import Sample, Turn

#: bytes of a line at most; a prediction with thousands of forced tokens is far below
_LONGEST_LINE = 1 << 26


class Store:
    """The folder of one run.

    Args:
        folder: made by :meth:`create`.

    Raises:
        PlanError: there is no run in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "plan.json").exists():
            raise PlanError(f"{folder} holds no run: start one with `uncomp eval run`")
        self.plan = Plan.from_dict(json.loads((folder / "plan.json").read_text("utf-8")))

    @classmethod
    def create(cls, folder: Path, plan: Plan) -> Store:
        """A new run, or the one that is there already and has the same plan or a part of it.

        Raises:
            PlanError: the folder holds something else. Nothing is overwritten.
        """
        path = folder / "plan.json"
        if path.exists():
            store = cls(folder)
            if plan.extends(store.plan):
                store.plan = plan
                return store
            there, asked = store.plan.to_dict(), plan.to_dict()
            changed = {k: (there[k], asked[k]) for k in asked if there[k] != asked[k]}
            says = "; ".join(f"{k}: {a!r} there, {b!r} asked" for k, (a, b) in changed.items())
            raise PlanError(f"{folder} holds another run ({says}): choose another --out")
        if folder.exists() and any(folder.iterdir()):
            raise PlanError(f"{folder} is not empty and holds no run: choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        _replace(path, plan.to_json())
        return cls(folder)

    def keep_plan(self) -> None:
        """Write the plan, which may have grown since it was read."""
        _replace(self.folder / "plan.json", self.plan.to_json())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from writing to the same run.

        Raises:
            PlanError: one already does.
        """
        with open(self.folder / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise PlanError(f"{self.folder}: another process works on this run") from error
            yield

    def facts(self) -> dict[str, Any]:
        """What is known of the run so far."""
        path = self.folder / "facts.json"
        return json.loads(path.read_text("utf-8")) if path.exists() else {}

    def add_facts(self, **facts: Any) -> None:
        """Add to the facts; entries of the same name are replaced."""
        text = json.dumps({**self.facts(), **facts}, indent=1)
        _replace(self.folder / "facts.json", text + "\n")

    def samples(self) -> list[Sample] | None:
        """The prepared samples; None before that stage is done."""
        path = self.folder / "samples.jsonl"
        return [_sample(row) for row in _rows(path)] if path.exists() else None

    def write_samples(self, samples: Iterable[Sample]) -> None:
        """All at once: a half-written preparation does not count."""
        lines = (json.dumps(asdict(sample)) + "\n" for sample in samples)
        _replace(self.folder / "samples.jsonl", "".join(lines))

    def predictions(self) -> Iterator[Prediction]:
        """Those made so far, without a last line that was cut off."""
        for row in _rows(self.folder / "predictions.jsonl"):
            yield Prediction(**{**row, "case": Case(**row["case"])})

    @contextmanager
    def predicting(self) -> Iterator[_Appender]:
        """Append predictions; each is on disk before the next is waited for."""
        path = self.folder / "predictions.jsonl"
        _drop_half_line(path)
        with open(path, "a", encoding="utf-8") as file:
            yield _Appender(file)

    def scores(self) -> list[Scored]:
        """Of the score stage; empty before."""
        return [
            Scored(**{**row, "case": Case(**row["case"])})
            for row in _rows(self.folder / "scores.jsonl")
        ]

    def write_scores(self, scores: Iterable[Scored]) -> None:
        lines = (json.dumps(asdict(score)) + "\n" for score in scores)
        _replace(self.folder / "scores.jsonl", "".join(lines))


class _Appender:
    def __init__(self, file: Any) -> None:
        self._file = file

    def add(self, prediction: Prediction) -> None:
        self._file.write(json.dumps(asdict(prediction)) + "\n")
        self._file.flush()


def _sample(row: dict[str, Any]) -> Sample:
    turns = [
        Turn(**{**t, "references": tuple(t["references"]), "stop": tuple(t["stop"])})
        for t in row["turns"]
    ]
    return Sample(**{**row, "turns": tuple(turns)})


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def _drop_half_line(path: Path) -> None:
    """A killed process may have left the beginning of a line."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        start = max(0, path.stat().st_size - _LONGEST_LINE)
        file.seek(start)
        end = file.read().rfind(b"\n") + 1
        file.truncate(start + end)


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
