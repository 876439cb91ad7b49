"""The folder of a serving comparison: one file per finished load, so that a killed run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uncomp.eval.bench import rows as rows_
from uncomp.eval.bench import serve_records, serve_rows
from uncomp.eval.bench.serve_plan import Load, Session
from uncomp.eval.bench.serve_records import Measured


class Taken(RuntimeError):
    """The name holds results of another run; the message says what differs."""


@dataclass(frozen=True)
class Store:
    """Files of a run: ``NAME.csv``, ``.md``, ``.json``, and ``NAME.runs/`` with every load.

    Attributes:
        folder: results folder.
        name: of the run.
        settings: what must be equal for results to belong together, JSON-ready.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any]

    @property
    def runs(self) -> Path:
        """The folder of single loads and logs."""
        return self.folder / f"{self.name}.runs"

    def output(self, suffix: str) -> Path:
        """A file of results."""
        return self.folder / f"{self.name}{suffix}"

    def claim(self, force: bool) -> None:
        """Take the name for these settings.

        Args:
            force: throw away what another run left under it.

        Raises:
            Taken: another run has it.
        """
        path = self.runs / "settings.json"
        wanted = json.loads(json.dumps(dict(self.settings)))
        if path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            if held == wanted:
                return
            differ = sorted(
                f"{k} was {held.get(k)!r}, is {wanted.get(k)!r}"
                for k in {*held, *wanted}
                if held.get(k) != wanted.get(k)
            )
            reason = f"{self.runs} holds another run: {'; '.join(differ)}"
        elif self.output(".csv").exists():
            reason = f"{self.output('.csv')} exists and is not of a run in {self.runs}"
        else:
            self._begin(path, wanted)
            return
        if not force:
            raise Taken(f"{reason}. Choose another --name, or overwrite it with --force")
        if path.exists():
            shutil.rmtree(self.runs)
        for suffix in (".csv", ".md", ".json"):
            self.output(suffix).unlink(missing_ok=True)
        self._begin(path, wanted)

    def _begin(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.runs.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1), encoding="utf-8")

    def has(self, session: Session, load: Load) -> bool:
        """Whether a load is finished."""
        return (self.runs / session.file(load)).exists()

    def put(self, session: Session, load: Load, record: Measured) -> None:
        """Keep the result of a load."""
        serve_records.save(record, self.runs / session.file(load))

    def results(self, sessions: list[Session]) -> list[Measured]:
        """All results there are, in the order of the plan."""
        return [
            serve_records.load(self.runs / session.file(load))
            for session in sessions
            for load in session.loads
            if self.has(session, load)
        ]

    def publish(
        self, results: list[Measured], traffic: str, labels: dict[str, str]
    ) -> tuple[list[rows_.Row], str]:
        """Write rows, table and JSON; the rows and the table."""
        named = {k: str(self.settings[k]) for k in ("model", "pool_bytes") if k in self.settings}
        facts = {**serve_rows.facts(results), **named}
        found = serve_rows.rows(results, traffic, labels)
        table = serve_rows.table(results, labels)
        self.output(".csv").unlink(missing_ok=True)  # of this run, see claim()
        rows_.merge(found, self.output(".csv"), facts)
        self.output(".md").write_text(f"{traffic}\n\n{table}\n", encoding="utf-8")
        data = serve_rows.as_json(results, dict(self.settings), facts)
        self.output(".json").write_text(json.dumps(data), encoding="utf-8")
        return found, table
