"""What an evaluation is: everything that decides its numbers, before it starts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from uncomp.eval.methods import KEEPS

#: what a run can get more of once it has begun
_GROW = ("samples", "methods", "keeps", "custom")


class PlanError(ValueError):
    """A plan that cannot be run; the message says why and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One evaluation.

    Attributes:
        model: folder or hub name; of a server, the name whose tokenizer is loaded.
        revision: of the hub model.
        tasks: names of tasks or families.
        lengths: tokens of a whole prompt with its answer.
        samples: per task and length.
        seed: of the generators.
        methods: names; the full cache is always run.
        custom: further methods, name to settings.
        keeps: keep ratios.
        chat: chat template for the tasks that leave it open.
        data: folder with data sets.
        pins: ``owner/name@revision`` of hub data sets to be read at that revision.
        accept: SHA-256 of packaged data files that may differ from the pinned ones.
        calibration: file for methods that need one.
        engine: arguments of the engine.
        base_url: of a running server; None starts an engine here.
        served_model: name on that server.
        top_logprobs: best tokens that likelihood tasks compare.
        query_agnostic: compress when the context is read, before the question is.
    """

    model: str
    revision: str | None = None
    tasks: tuple[str, ...] = ("ruler",)
    lengths: tuple[int, ...] = (4096,)
    samples: int = 20
    seed: int = 0
    methods: tuple[str, ...] = ("uncomp", "snapkv", "adakv", "streaming", "random")
    custom: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    keeps: tuple[float, ...] = KEEPS
    chat: bool = True
    data: str | None = None
    pins: tuple[str, ...] = ()
    accept: tuple[str, ...] = ()
    calibration: str | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    base_url: str | None = None
    served_model: str | None = None
    top_logprobs: int = 20
    query_agnostic: bool = False

    def __post_init__(self) -> None:
        for name in ("tasks", "lengths", "methods", "keeps", "pins", "accept"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.tasks:
            raise PlanError("no task: name some with --tasks (uncomp eval list)")
        if not self.lengths or min(self.lengths) < 64:
            raise PlanError(f"lengths={self.lengths}: must be token counts of at least 64")
        if self.samples < 1:
            raise PlanError(f"samples={self.samples}: must be at least 1")
        if not self.keeps or not all(0 < keep <= 1 for keep in self.keeps):
            raise PlanError(f"keeps={self.keeps}: must be ratios in (0, 1], e.g. 0.25")
        if not 1 <= self.top_logprobs <= 1000:
            raise PlanError(f"top_logprobs={self.top_logprobs}: must be between 1 and 1000")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return json.loads(json.dumps(asdict(self)))

    def to_json(self) -> str:
        """As it is written to disk."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Plan:
        """Raises:
        PlanError: for unknown entries.
        """
        unknown = sorted(set(given) - {f.name for f in fields(cls)})
        if unknown:
            raise PlanError(f"unknown entries in the plan: {unknown}")
        return cls(**given)

    def extends(self, other: Plan) -> bool:
        """Whether this is `other` with more samples, methods or keep ratios, or the same."""
        mine, theirs = self.to_dict(), other.to_dict()
        return (
            all(mine[k] == theirs[k] for k in mine if k not in _GROW)
            and self.samples >= other.samples
            and all(set(mine[k]) >= set(theirs[k]) for k in ("methods", "keeps"))
            and all(mine["custom"].get(k) == v for k, v in theirs["custom"].items())
        )

    def name(self) -> str:
        """Folder name: model, tasks and a digest of the whole plan."""
        digest = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()
        model = self.model.rstrip("/").rpartition("/")[2]
        words = "-".join([model, *self.tasks])
        return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', words)[:60]}-{digest[:8]}"
