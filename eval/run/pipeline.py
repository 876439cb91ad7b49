"""All stages of one evaluation, in order, each of them only as far as it is not done."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from uncomp.eval import methods as catalogue
from uncomp.eval.bench.rows import machine
from uncomp.eval.engines.base import Engine, EngineMissing
from uncomp.eval.methods import Method
from uncomp.eval.run.plan import Plan, PlanError
from uncomp.eval.run.predict import pending, predict
from uncomp.eval.run.prepare import prepare
from uncomp.eval.run.prompts import CUT_RULE
from uncomp.eval.run.score import score
from uncomp.eval.run.store import Store
from uncomp.eval.tasks import hub, registry, sources
from uncomp.eval.tasks.base import Sample

STAGES = ("prepare", "predict", "score", "report")
#: when a prompt is compressed, as reports state it
AWARE = "after the whole prompt: what is scored knows the question (query-aware)"
AGNOSTIC = "after the context, before the question is read (query-agnostic)"
#: tokens that a chat template may add to a prompt of the wanted length
_TEMPLATE = 256

Say = Callable[[str], None]
#: makes an engine for a plan and some of its methods
Start = Callable[[Plan, Sequence[Method]], Engine]


def run(
    store: Store,
    stages: Sequence[str],
    say: Say,
    start: Start | None = None,
    serving: Sequence[Path] = (),
) -> list[Path]:
    """Run stages of an evaluation.

    Args:
        store: of the run.
        stages: from :data:`STAGES`; what they need of earlier ones must be there.
        say: takes progress lines.
        start: makes engines; default: what the plan says.
        serving: results of `uncomp bench serve` that the report shows too.

    Returns:
        The files of the report, if that stage was asked for.

    Raises:
        PlanError, DataError, EngineError: see the stages.
    """
    with store.alone():
        plan = store.plan
        chosen = check(plan)
        store.add_facts(
            seeds=plan.seed,
            methods={m.name: asdict(m) for m in chosen},
            rule_for_long_prompts=CUT_RULE,
            compressed=AGNOSTIC if plan.query_agnostic else AWARE,
        )
        if "prepare" in stages:
            for name in plan.pins:
                hub.pin(name)
            for sha256 in plan.accept:
                sources.accept(sha256)
            tasks = registry.find(plan.tasks)
            prepare(store, tasks, load_tokenizer(plan), say)
        if "predict" in stages:
            _predict(store, _samples(store), chosen, start or start_engine, say)
        if "score" in stages:
            say(f"{len(score(store, _samples(store), say))} scores")
        if "report" in stages:
            return _report(store, say, serving)
        return []


def check(plan: Plan) -> list[Method]:
    """The methods of a plan that can be run.

    Raises:
        PlanError: unknown methods or tasks, or a calibration file is missing.
    """
    try:
        registry.find(plan.tasks)
        chosen = catalogue.find(plan.methods, plan.custom, plan.query_agnostic)
    except ValueError as error:
        raise PlanError(str(error)) from error
    missing = [m.name for m in chosen if m.calibrated]
    if missing and plan.calibration is None and plan.base_url is None:
        raise PlanError(
            f"{', '.join(missing)}: what is known of the heads comes from a calibration file: run "
            f"`uncomp calibrate {plan.model} -o FILE` and give --calibration FILE"
        )
    return chosen


def load_tokenizer(plan: Plan) -> Any:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(plan.model, revision=plan.revision)


def start_engine(plan: Plan, methods: Sequence[Method]) -> Engine:
    """The server of the plan, or an engine here that can serve ``methods``."""
    if methods[0].library == "kvpress":
        from uncomp.eval.engines.kvpress import KvpressEngine

        window = plan.engine.get("max_model_len", _window(plan))
        dtype = plan.engine.get("dtype", "auto")
        return KvpressEngine(plan.model, window, plan.revision, dtype)
    if plan.base_url is not None:
        from uncomp.eval.engines.http import HttpEngine

        return HttpEngine(plan.base_url, load_tokenizer(plan), plan.served_model)
    from uncomp.eval.engines.local import LocalEngine

    arguments: dict[str, Any] = {"max_model_len": _window(plan), "seed": plan.seed}
    if plan.revision is not None:
        arguments["revision"] = plan.revision
    arguments |= {**plan.engine, **methods[0].engine}
    settings = None
    if any(not method.full for method in methods):
        settings = catalogue.server_settings(methods, plan.calibration)
    return LocalEngine(plan.model, settings, arguments, plan.top_logprobs)


def _window(plan: Plan) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(plan.model, revision=plan.revision).get_text_config()
    wanted = max(plan.lengths) + _TEMPLATE
    return min(wanted, getattr(config, "max_position_embeddings", wanted))


def _samples(store: Store) -> list[Sample]:
    samples = store.samples()
    if samples is None:
        raise PlanError(f"{store.folder} has no samples yet: run its prepare stage first")
    return samples


def _predict(
    store: Store, samples: list[Sample], methods: list[Method], start: Start, say: Say
) -> None:
    if not any(True for _ in pending(store, samples, methods)):
        say("every question is answered")
        return
    missing = None
    for same in _by_engine(methods):
        if not any(True for _ in pending(store, samples, same)):
            continue
        say(f"starting the engine for {', '.join(m.name for m in same)}")
        try:
            engine = start(store.plan, same)
        except EngineMissing as error:
            missing = error  # those that are here go first
            continue
        try:
            note_engine(store, engine.facts(), same)
            with _bar(say) as advance:
                predict(store, samples, same, engine, advance)
        finally:
            engine.close()
    if missing is not None:
        raise missing


def note_engine(store: Store, found: dict[str, Any], served: list[Method]) -> None:
    """What answered, on what; a run that was continued elsewhere says so."""
    here = machine()
    versions = {name: here.pop(name) for name in ("python", "torch", "vllm", "transformers")}
    known = store.facts()
    engines = known.get("engines", [])
    one = {**found, "for": [method.name for method in served]}
    this = {name: here[name] for name in ("cpu", "cores")}
    commits = [c for c in known.get("commit", "").split(" + ") if c not in ("", here["commit"])]
    machines = [m for m in known.get("machine", []) if m != this]
    versions["uncomp"] = here["uncomp"]
    if served[0].library != "vllm":  # the run's versions are those of the engine it is about
        versions = known.get("versions", versions)
    store.add_facts(
        model=found.get("model", store.plan.model),
        revision=found.get("revision"),
        machine=[*machines, this],
        versions=versions,
        commit=" + ".join([*commits, here["commit"]]),
        date=here["date"],
        command=(_only_continues() and known.get("command")) or _command(),
        engines=engines if one in engines else [*engines, one],
        kv_bytes_per_token=found.get("kv_bytes_per_token", known.get("kv_bytes_per_token")),
    )


def _by_engine(methods: list[Method]) -> Iterator[list[Method]]:
    """Methods that one engine can serve together."""
    groups: dict[str, list[Method]] = {}
    for method in methods:
        needs = [method.library, dict(method.engine)]
        groups.setdefault(json.dumps(needs, sort_keys=True), []).append(method)
    yield from groups.values()


@contextmanager
def _bar(say: Say) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with the time left on a terminal, else a line every few per cent."""
    from tqdm import tqdm

    bar = tqdm(unit="answer", dynamic_ncols=True, file=sys.stderr, mininterval=2, initial=0)

    def advance(done: int, total: int) -> None:
        if bar.total != total:
            bar.reset(total)
            bar.initial = done
            bar.n = done
            bar.refresh()
        bar.update(done - bar.n)

    try:
        yield advance
    finally:
        bar.close()


def _only_continues() -> bool:
    """Whether this command names only the run's folder: it does not say what the run is."""
    return sys.argv[1:3] == ["eval", "predict"]


def _command() -> str:
    words = ["uncomp", *sys.argv[1:]] if sys.argv[0].endswith("uncomp") else sys.argv
    return " ".join(words)


def _report(store: Store, say: Say, serving: Sequence[Path]) -> list[Path]:
    from uncomp.eval.report.serving import read_serving
    from uncomp.eval.report.write import write_report

    scores = store.scores()
    if not scores:
        raise PlanError(f"{store.folder} has no scores yet: run its score stage first")
    files = write_report(scores, store.facts(), store.folder / "report", *read_serving(serving))
    for file in files:
        say(str(file))
    return files
