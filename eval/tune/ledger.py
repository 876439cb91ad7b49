"""A run's folder whose predictions are kept in memory too: a search looks at them all the time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from uncomp.eval.run.plan import Plan
from uncomp.eval.run.records import Prediction
from uncomp.eval.run.store import Store


class Ledger(Store):
    """The folder of one run; this process is the only one that writes to it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.made = list(super().predictions())

    @classmethod
    def create(cls, folder: Path, plan: Plan) -> Ledger:
        """See :meth:`Store.create`."""
        Store.create(folder, plan)
        return cls(folder)

    def predictions(self) -> Iterator[Prediction]:
        yield from tuple(self.made)

    @contextmanager
    def predicting(self) -> Iterator[Any]:
        with super().predicting() as file:
            yield _Both(file, self.made)


class _Both:
    def __init__(self, file: Any, made: list[Prediction]) -> None:
        self._file, self._made = file, made

    def add(self, prediction: Prediction) -> None:
        self._file.add(prediction)
        self._made.append(prediction)
