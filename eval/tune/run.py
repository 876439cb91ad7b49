"""A search from its options to its result. Everything measured is on disk when it is used."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from uncomp.eval import methods as catalogue
from uncomp.eval.engines.base import Engine
from uncomp.eval.methods import Method
from uncomp.eval.run import pipeline
from uncomp.eval.run.plan import Plan, PlanError
from uncomp.eval.run.prepare import prepare
from uncomp.eval.run.prompts import Renderer
from uncomp.eval.tasks import registry
from uncomp.eval.tasks.base import Sample
from uncomp.eval.tune.bounds import samples_needed
from uncomp.eval.tune.data import Rows, read_rows
from uncomp.eval.tune.ledger import Ledger
from uncomp.eval.tune.measure import EngineJudge, with_own_answers
from uncomp.eval.tune.options import Options, same_search
from uncomp.eval.tune.progress import Progress
from uncomp.eval.tune.race import Outcome, corrected_upper, race
from uncomp.eval.tune.result import Result
from uncomp.eval.tune.search import best, need_optuna, pareto, search
from uncomp.eval.tune.space import Setting
from uncomp.eval.tune.speed import Comparison, Rate, SpeedError, compare

Say = Callable[[str], None]
#: makes an engine for a plan and its methods
StartEngine = Callable[[Plan, Sequence[Method]], Engine]


def tune(options: Options, out: Path | None, say: Say, start: StartEngine | None = None) -> Result:
    """Search, measure, and write the result into the run's folder.

    Args:
        options: of the search.
        out: folder; None: ``uncomp-tune/`` and a name made of the options.
        say: takes progress lines.
        start: makes the engine; default: what the options say.

    Raises:
        PlanError, RowsError: options or data that cannot be used.
        DataError: data of a built-in task cannot be had.
        EngineError: the engine failed; the same call goes on from there.
    """
    need_optuna()
    rows = None if options.data is None else _rows(options)
    plan = _plan(options, rows)
    ledger = Ledger.create(out or Path("uncomp-tune", _name(plan, options)), plan)
    say(f"run folder {ledger.folder}")
    with ledger.alone():
        same_search(ledger.folder, options)
        methods = catalogue.find(plan.methods, plan.custom)
        with _engine(ledger, methods, start or pipeline.start_engine, say) as engine:
            samples = _samples(ledger, rows, methods[0], engine, say)
            _say_power(options, len(samples), say)
            judge, outcomes = _search(options, ledger, samples, methods, engine, say)
            speeds = _speeds(options, ledger, samples, pareto(outcomes), engine, say)
        outcomes = [
            dataclasses.replace(
                o, corrected=corrected_upper(judge, o, samples, options.rules, len(outcomes))
            )
            for o in outcomes
        ]
        most = max(outcome.loss.n for outcome in outcomes)
        full = judge.full_mean(samples[:most])
        result = Result(
            options,
            ledger.facts(),
            outcomes,
            full,
            most,
            len(samples),
            speeds,
            longest=max(prediction.prompt_tokens for prediction in ledger.made),
            cut=len({(p.task, p.sample) for p in ledger.made if p.cut_tokens}),
        )
        result.write(ledger.folder)
        chosen = best(outcomes)
        if chosen is not None:
            say(f"settings written to {ledger.folder / 'settings.yaml'}")
        return result


def _rows(options: Options) -> Rows:
    assert options.data is not None
    rows = read_rows(options.data, options.max_tokens, options.metric)
    order = random.Random(options.seed).sample(rows.samples, len(rows.samples))
    return dataclasses.replace(rows, samples=tuple(order[: options.samples]))


def _plan(options: Options, rows: Rows | None) -> Plan:
    if rows is None:
        plan = options.plan(options.tasks, options.lengths, options.samples or 60)
        pipeline.check(plan)
        return plan
    # The hash is part of the plan: other data, another run.
    task = f"data-{rows.file.sha256[:16]}"
    plan = options.plan((task,), options.lengths, len(rows.samples))
    renderer = Renderer(pipeline.load_tokenizer(plan), 1 << 30, plan.chat)
    longest = max(
        len(renderer.prompt(sample, 0).ids) + sample.turns[0].max_tokens for sample in rows.samples
    )
    return dataclasses.replace(plan, lengths=(max(64, longest),))


def _name(plan: Plan, options: Options) -> str:
    return f"{plan.name()}-loss{options.max_loss:g}"


class _Lazy:
    """An engine that is started when it is first needed."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._make, self.engine = make, None

    engine: Engine | None

    def __call__(self) -> Engine:
        if self.engine is None:
            self.engine = self._make()
        return self.engine


@contextmanager
def _engine(
    ledger: Ledger, methods: Sequence[Method], start: StartEngine, say: Say
) -> Iterator[_Lazy]:
    def make() -> Engine:
        say("starting the engine")
        engine = start(ledger.plan, methods)
        try:
            pipeline.note_engine(ledger, engine.facts(), list(methods))
        except BaseException:
            engine.close()
            raise
        return engine

    lazy = _Lazy(make)
    try:
        yield lazy
    finally:
        if lazy.engine is not None:
            lazy.engine.close()


def _samples(
    ledger: Ledger, rows: Rows | None, full: Method, engine: _Lazy, say: Say
) -> list[Sample]:
    """In the order in which they are used."""
    if rows is None:
        tasks = registry.find(ledger.plan.tasks)
        found = ledger.samples()
        if found is None:
            found = prepare(ledger, tasks, pipeline.load_tokenizer(ledger.plan), say)
        return random.Random(ledger.plan.seed).sample(found, len(found))
    found = ledger.samples()
    if found is None:
        answers = Ledger.create(ledger.folder / "answers", ledger.plan)
        found, without = with_own_answers(answers, rows.samples, full, engine)
        if not found:
            raise PlanError("the full cache's answers are all empty: there is nothing to compare")
        ledger.add_facts(
            data=[dataclasses.asdict(rows.file)], rows=len(found), rows_without_answer=without
        )
        ledger.write_samples(found)
    left_out = ledger.facts().get("rows_without_answer", 0)
    if left_out:
        say(f"{left_out} rows left out: the full cache's own answer to them is empty")
    return found


def _say_power(options: Options, samples: int, say: Say) -> None:
    rules = options.rules
    needed = samples_needed(rules.limit, rules.level)
    if samples < needed:
        say(
            f"{samples} samples are too few: to show a loss below {options.max_loss:g} at "
            f"{options.confidence:.0%} confidence with scores of 0 or 1 takes {needed}, even if no "
            f"answer changes ({options.looks} looks at the data; --looks 1 takes "
            f"{samples_needed(rules.limit, rules.alpha)}). Going on; only scores between 0 and 1 "
            f"can still show it"
        )


def _search(
    options: Options,
    ledger: Ledger,
    samples: Sequence[Sample],
    methods: Sequence[Method],
    engine: _Lazy,
    say: Say,
) -> tuple[EngineJudge, list[Outcome]]:
    trials = min(options.trials, len(options.space.all()))
    turns = sum(len(sample.turns) for sample in samples)
    per_sample = turns / len(samples)
    with Progress((trials + -(-trials // options.parallel)) * turns, say) as progress:
        judge = EngineJudge(ledger, methods, engine, progress.advance)

        def try_all(settings: Sequence[Setting]) -> list[Outcome]:
            outcomes = race(
                judge,
                settings,
                samples,
                options.rules,
                lambda spared: progress.spare(round(spared * per_sample)),
            )
            for outcome in outcomes:
                progress.note(outcome)
            return outcomes

        found = search(
            options.space,
            try_all,
            options.rules.limit,
            options.trials,
            options.parallel,
            options.seed,
        )
    return judge, found


def _speeds(
    options: Options,
    ledger: Ledger,
    samples: Sequence[Sample],
    front: Sequence[Outcome],
    engine: _Lazy,
    say: Say,
) -> dict[str, Comparison]:
    """Throughput of the front, by setting; what was measured before is not measured again."""
    if not options.speed:
        return {}
    path = ledger.folder / "speed.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    about = f"batch={options.speed_batch} tokens={options.speed_tokens}"
    about += f" rounds={options.speed_rounds}"
    found: dict[str, Comparison] = {}
    for number, outcome in enumerate(front, 1):
        key = f"{outcome.setting.name} {about}"
        if key not in known:
            say(f"throughput {number}/{len(front)}: {outcome.setting.name}")
            try:
                known[key] = dataclasses.asdict(_speed(options, ledger, samples, outcome, engine()))
            except SpeedError as error:
                say(f"no throughput of {outcome.setting.name}: {error}")
                continue
            path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        found[outcome.setting.name] = _comparison(known[key])
    return found


def _speed(
    options: Options, ledger: Ledger, samples: Sequence[Sample], outcome: Outcome, engine: Engine
) -> Comparison:
    methods = {m.name: m for m in catalogue.find(ledger.plan.methods, ledger.plan.custom)}
    renderer = Renderer(engine.tokenizer, engine.max_model_len, ledger.plan.chat)
    prompts = sorted({renderer.prompt(sample, 0).ids for sample in samples}, key=len)
    room = engine.max_model_len - options.speed_tokens - 8
    prompts = [ids for ids in prompts if len(ids) <= room][-options.speed_batch :]
    if not prompts:
        raise SpeedError(
            f"no prompt leaves room for {options.speed_tokens} tokens (--speed-tokens)"
        )
    own = methods[outcome.setting.method].request(outcome.setting.keep)
    full = methods["full"].request(1.0)
    return compare(engine, prompts, full, own, options.speed_tokens, options.speed_rounds)


def _comparison(row: dict[str, Any]) -> Comparison:
    return Comparison(**{**row, "full": Rate(**row["full"]), "own": Rate(**row["own"])})
