"""What a search is told, beside what decides the answers (:class:`uncomp.eval.run.plan.Plan`)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from uncomp.eval.run.plan import Plan, PlanError
from uncomp.eval.tune.race import Rules
from uncomp.eval.tune.space import Space

#: Best tokens compared for rows without references: ties at the top are seen.
TOP_LOGPROBS = 5


@dataclass(frozen=True, kw_only=True)
class Options:
    """One search.

    Attributes:
        model, revision, chat, engine, base_url, served_model: see :class:`Plan`.
        data: JSON lines of the user's; None for tasks.
        tasks, lengths, task_data, pins: built-in tasks; the last two as ``data`` and ``pins`` of
            :class:`Plan`.
        samples: per task and length, or rows of ``data`` at most (None: 60, or all).
        max_tokens, metric: of rows that do not say.
        space: what is searched.
        max_loss: points of 100 that the mean score may fall.
        confidence: of each setting's verdict.
        looks: at the data of a setting.
        trials, parallel, seed: of the search.
        speed: whether throughput is measured, with ``speed_batch`` prompts, ``speed_tokens`` tokens
            and ``speed_rounds`` rounds.
        user_tokens: length at which users are counted; None: the longest prompt.
        kv_memory: bytes of the pool; None: the engine's own.
    """

    model: str
    space: Space
    max_loss: float
    revision: str | None = None
    chat: bool = True
    engine: dict[str, Any]
    base_url: str | None = None
    served_model: str | None = None
    data: Path | None = None
    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (4096,)
    task_data: str | None = None
    pins: tuple[str, ...] = ()
    samples: int | None = None
    max_tokens: int = 64
    metric: str = "contains"
    confidence: float = 0.95
    looks: int = 5
    trials: int = 32
    parallel: int = 4
    seed: int = 0
    speed: bool = True
    speed_batch: int = 8
    speed_tokens: int = 64
    speed_rounds: int = 3
    user_tokens: int | None = None
    kv_memory: int | None = None

    def __post_init__(self) -> None:
        if (self.data is None) == (not self.tasks):
            raise PlanError("give either --data FILE or --tasks NAMES (uncomp eval list)")
        if not 0 < self.max_loss < 100:
            raise PlanError(f"max_loss={self.max_loss}: must be points between 0 and 100, e.g. 1")
        if not 0.5 < self.confidence < 1:
            raise PlanError(f"confidence={self.confidence}: must be in (0.5, 1), e.g. 0.95")
        for name in ("looks", "trials", "parallel", "speed_batch", "speed_tokens", "speed_rounds"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("samples", "user_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise PlanError(f"{name}={getattr(self, name)}: must be at least 1")

    @property
    def rules(self) -> Rules:
        return Rules(self.max_loss / 100, 1 - self.confidence, self.looks)

    def plan(self, tasks: tuple[str, ...], lengths: tuple[int, ...], samples: int) -> Plan:
        """What decides the answers. Every method of the space is in it."""
        methods = self.space.methods()
        return Plan(
            model=self.model,
            revision=self.revision,
            tasks=tasks,
            lengths=lengths,
            samples=samples,
            seed=self.seed,
            methods=tuple(methods),
            custom=methods,
            keeps=self.space.keeps,
            chat=self.chat,
            data=self.task_data,
            pins=self.pins,
            engine=self.engine,
            base_url=self.base_url,
            served_model=self.served_model,
            top_logprobs=TOP_LOGPROBS,
        )

    def deciding(self) -> dict[str, Any]:
        """What decides the course of the search, beside the plan; JSON-ready.

        ``trials`` is not in it: a search may go on with more.
        """
        names = ("max_loss", "confidence", "looks", "parallel", "max_tokens", "metric")
        return {**{name: getattr(self, name) for name in names}, "space": _json(self.space)}


def _json(value: Any) -> Any:
    return json.loads(json.dumps(asdict(value)))


def same_search(folder: Path, options: Options) -> None:
    """Note what decides the search, or compare it with what is there.

    Raises:
        PlanError: the folder holds a search with other options.
    """
    path = folder / "search.json"
    asked = options.deciding()
    if not path.exists():
        path.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in asked if asked[name] != there.get(name)]
    if changed:
        says = "; ".join(f"{n}: {there.get(n)!r} there, {asked[n]!r} asked" for n in changed)
        raise PlanError(f"{folder} holds another search ({says}): choose another --out")
