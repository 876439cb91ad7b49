"""The stages together, on an engine that answers from a list: what is asked, kept and repeated."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from letters import Letters

from uncomp.cli import main
from uncomp.eval.engines.base import Answer, Ask, EngineError, EngineMissing
from uncomp.eval.methods import METHODS, Method
from uncomp.eval.run import pipeline
from uncomp.eval.run.plan import Plan, PlanError
from uncomp.eval.run.records import Case
from uncomp.eval.run.store import Store
from uncomp.eval.tasks.teacher_forcing import TokenRecord

STAGES = pipeline.STAGES


class Scripted:
    """Finds every number with the full cache, none with another; dies after `life` answers."""

    tokenizer = Letters()
    max_model_len = 8192

    def __init__(self, methods: Sequence[Method], life: int = 10**6) -> None:
        self.methods, self.life = [m.name for m in methods], life
        self.compresses = True
        self.asked: list[Ask] = []
        self.closed = False

    def facts(self) -> dict[str, Any]:
        size = 500 if "full-fp8" in self.methods else 1000
        return {"engine": "scripted", "model": "org/m", "kv_bytes_per_token": size}

    def answer(self, groups: Sequence[Sequence[Ask]]) -> Iterator[Answer]:
        for group in groups:
            assert len({tuple(ask.prompt) for ask in group}) == 1
            for ask in group:
                if len(self.asked) == self.life:
                    raise EngineError("died")
                self.asked.append(ask)
                yield self._answer(ask)

    def _answer(self, ask: Ask) -> Answer:
        full = ask.extra.get("kv_compress") == "false"
        if ask.forced:
            own = -1.0 if full else -2.0
            records = tuple(TokenRecord(own, (t, 1), (own, -3.0)) for t in ask.forced)
            return Answer(ask.key, "", len(ask.forced), "length", 0.1, _kept(ask), records)
        text = Letters().decode(list(ask.prompt))
        number = "".join(c for c in text.split(" is: ")[1][:7]) if full else "none"
        return Answer(ask.key, f" {number}.", 4, "stop", 0.1, _kept(ask))

    def close(self) -> None:
        self.closed = True


def _kept(ask: Ask) -> dict[str, Any] | None:
    keep = ask.extra.get("kv_keep")
    if keep is None:
        return None
    return {"compactions": 1, "kept_tokens": int(1000 * keep), "full_tokens": 1000}


@pytest.fixture(autouse=True)
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "load_tokenizer", lambda plan: Letters())


def plan(**changes: Any) -> Plan:
    given: dict[str, Any] = {
        "model": "m",
        "tasks": ("needle",),
        "lengths": (4096,),
        "samples": 5,
        "methods": ("snapkv", "streaming"),
        "keeps": (0.5, 0.25),
        "chat": False,
    }
    return Plan(**{**given, **changes})


def quiet(text: str) -> None:
    pass


def test_from_plan_to_report(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "run", plan())
    files = pipeline.run(store, STAGES, quiet, lambda plan, methods: Scripted(methods))
    scores = store.scores()
    assert len(scores) == 5 * 5
    assert {s.value for s in scores if s.case.method == "full"} == {1.0}
    assert {s.value for s in scores if s.case.method != "full"} == {0.0}
    assert {(s.case.keep, s.keep_measured) for s in scores} == {
        (1.0, 1.0),
        (0.5, 0.5),
        (0.25, 0.25),
    }
    assert {s.facts["length"] for s in scores} == {4096}
    facts = store.facts()
    assert facts["model"] == "org/m"
    assert facts["methods"]["snapkv"]["settings"] == METHODS["snapkv"].settings
    assert all(file["sha256"] and file["tasks"] == ["needle"] for file in facts["data"])
    assert {file.name for file in files} >= {"report.html", "report.md", "rows.csv"}
    assert all(file.stat().st_size > 100 for file in files)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(tmp_path / "run", plan())
    engines: list[Scripted] = []

    def start(plan: Plan, methods: Sequence[Method]) -> Scripted:
        engines.append(Scripted(methods, life=7 if not engines else 10**6))
        return engines[-1]

    with pytest.raises(EngineError, match="died"):
        pipeline.run(store, STAGES, quiet, start)
    assert engines[0].closed
    samples = store.samples()
    said: list[str] = []
    pipeline.run(store, ("score",), said.append)
    # Five cases a sample: of the seven answers, two are of a sample that lacks others.
    assert said[0].startswith("4 of 5 samples have not been answered in full")
    assert len(store.scores()) == 5
    first = store.facts()["commit"]
    here = pipeline.machine()
    monkeypatch.setattr(pipeline, "machine", lambda: here | {"commit": "later"})
    pipeline.run(store, STAGES, quiet, start)
    assert store.samples() == samples
    assert store.facts()["commit"] == f"{first} + later"
    keys = [ask.key for engine in engines for ask in engine.asked]
    assert len(keys) == len(set(keys)) == 25
    pipeline.run(store, STAGES, quiet, start)
    assert len(engines) == 2  # nothing left to ask: no engine is started


def test_a_run_can_grow(tmp_path: Path) -> None:
    engines: list[Scripted] = []

    def start(plan: Plan, methods: Sequence[Method]) -> Scripted:
        engines.append(Scripted(methods))
        return engines[-1]

    folder = tmp_path / "run"
    for changes in ({"samples": 2}, {"samples": 4}, {"methods": ("streaming", "random", "snapkv")}):
        now = plan(**{"tasks": ("likelihood/repeat",), "samples": 4, **changes})
        pipeline.run(Store.create(folder, now), STAGES, quiet, start)
    assert [len(engine.asked) for engine in engines] == [2 * 5, 2 * 5, 4 * 2]
    store = Store(folder)
    assert len(list(store.predictions())) == 4 * 7
    for less in ({"samples": 3}, {"samples": 4}, {"samples": 9, "seed": 1}):
        with pytest.raises(PlanError, match="holds another run"):
            Store.create(folder, plan(**{"tasks": ("likelihood/repeat",), **less}))


def test_samples_that_change_when_more_are_made_are_refused(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "run", plan(samples=2))
    pipeline.run(store, ("prepare",), quiet)
    (first, *others) = store.samples() or []
    store.write_samples([replace(first, context="other"), *others])
    grown = Store.create(tmp_path / "run", plan(samples=3))
    with pytest.raises(PlanError, match=f"{first.id} is another than it was"):
        pipeline.run(grown, ("prepare",), quiet)
    assert Store(store.folder).plan.samples == 2


def test_query_agnostic_runs_compress_before_the_question(tmp_path: Path) -> None:
    engines: list[Scripted] = []

    def start(plan: Plan, methods: Sequence[Method]) -> Scripted:
        engines.append(Scripted(methods))
        return engines[-1]

    store = Store.create(tmp_path / "run", plan(query_agnostic=True))
    pipeline.run(store, STAGES, quiet, start)
    for ask in engines[0].asked:
        place = ask.extra.get("kv_compact_at")
        if ask.extra.get("kv_compress") == "false":
            assert place is None
        else:
            asked = Letters().decode(list(ask.prompt[place:]))
            assert asked.lstrip().startswith("What is the special magic number"), asked
    assert "query-agnostic" in (store.folder / "report" / "report.md").read_text("utf-8")


def test_an_engine_that_is_not_here_is_left_for_another_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM and kvpress do not fit into one environment, but work on one folder."""
    here = "kvpress"

    def start(plan: Plan, methods: Sequence[Method]) -> Scripted:
        if methods[0].library == here:
            raise EngineMissing(f"{here} is not installed")
        return Scripted(methods)

    names = ("snapkv", "kvpress-full", "kvpress-snapkv")
    store = Store.create(tmp_path / "run", plan(methods=names, samples=2))
    with pytest.raises(EngineMissing, match="kvpress is not installed"):
        pipeline.run(store, STAGES, quiet, start)
    done = {(p.case.method, p.case.keep) for p in store.predictions()}
    assert done == {("full", 1.0), ("snapkv", 0.5), ("snapkv", 0.25)}
    versions = store.facts()["versions"]
    command = store.facts()["command"]
    monkeypatch.setattr(sys, "argv", ["uncomp", "eval", "predict", "run"])
    here, machine = "vllm", pipeline.machine()
    monkeypatch.setattr(pipeline, "machine", lambda: {**machine, "transformers": "another"})
    pipeline.run(store, STAGES, quiet, start)
    done = {(p.case.method, p.case.keep) for p in store.predictions()}
    assert {("kvpress-full", 1.0), ("kvpress-snapkv", 0.25)} < done
    assert {s.value for s in store.scores() if s.case.method == "kvpress-full"} == {1.0}
    assert store.facts()["versions"] == versions
    assert store.facts()["command"] == command
    assert "kvpress-snapkv" in (store.folder / "report" / "report.md").read_text("utf-8")


def test_likelihood_is_compared_with_the_full_cache(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "run", plan(tasks=("likelihood/repeat",), samples=2))
    pipeline.run(store, STAGES[:3], quiet, lambda plan, methods: Scripted(methods))
    by = {(s.case, s.metric): s for s in store.scores()}
    assert by[Case("full"), "nll"].value == pytest.approx(1.0)
    assert by[Case("snapkv", 0.5), "nll"].value == pytest.approx(2.0)
    assert by[Case("snapkv", 0.5), "nll_increase"].value == pytest.approx(1.0)
    assert by[Case("full"), "kl"].value == pytest.approx(0.0)
    assert by[Case("snapkv", 0.5), "kl"].value > 0.1
    assert not by[Case("full"), "nll"].higher_is_better
    assert by[Case("full"), "top1_agreement"].higher_is_better


def test_engines_are_shared_where_they_can_be(tmp_path: Path) -> None:
    """FP8 needs an engine of its own, everything else one together."""
    store = Store.create(tmp_path / "run", plan(methods=("full-fp8", "snapkv"), samples=1))
    engines: list[Scripted] = []

    def start(plan: Plan, methods: Sequence[Method]) -> Scripted:
        engines.append(Scripted(methods))
        return engines[-1]

    pipeline.run(store, STAGES[:3], quiet, start)
    assert [engine.methods for engine in engines] == [["full", "snapkv"], ["full-fp8"]]
    kept = {s.case.method: s.keep_measured for s in store.scores() if s.case.keep != 0.25}
    assert kept == {"full": 1.0, "snapkv": 0.5, "full-fp8": 0.5}  # bytes


def test_a_server_without_the_plugin_is_only_asked_for_the_full_cache(tmp_path: Path) -> None:
    def start(plan: Plan, methods: Sequence[Method]) -> Scripted:
        engine = Scripted(methods)
        engine.compresses = False
        return engine

    store = Store.create(tmp_path / "run", plan())
    with pytest.raises(EngineError, match="only the full cache can be evaluated"):
        pipeline.run(store, STAGES, quiet, start)
    alone = Store.create(tmp_path / "alone", plan(methods=("full",)))
    pipeline.run(alone, STAGES, quiet, start)
    assert {s.case for s in alone.scores()} == {Case("full")}


def test_stages_say_what_they_miss(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "run", plan())
    for stage, says in (
        ("predict", "no samples yet"),
        ("score", "no samples"),
        ("report", "no scores"),
    ):
        with pytest.raises(PlanError, match=says):
            pipeline.run(store, [stage], quiet, lambda plan, methods: Scripted(methods))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": ("needles",)}, "no task or family 'needles'"),
        ({"methods": ("best",)}, "unknown method 'best'"),
        ({"methods": ("uncomp-v1",)}, "uncomp calibrate m -o FILE"),
    ],
)
def test_plans_are_checked_before_anything_starts(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        pipeline.check(plan(**changes))


def test_sigterm_closes_the_engine() -> None:
    """As a scheduler or `timeout` ends a run: the engine's processes must not stay behind."""
    program = (
        "import sys, time\n"
        "from uncomp.cli.eval import guarded\n"
        "def work(say):\n"
        "    try:\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('closed', flush=True)\n"
        "sys.exit(guarded('eval', work))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.terminate()
    assert child.communicate(timeout=50)[0] == "closed\n"
    assert child.returncode == 130


def test_methods_of_ones_own_need_not_be_named_twice(tmp_path: Path) -> None:
    command = [
        "eval", "prepare", "m", "--tasks", "needle", "--samples", "1", "--no-chat",
        "--methods", "snapkv", "--method", 'wide={"window": 64}', "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(command) == 0
    assert Store(tmp_path / "run").plan.methods == ("snapkv", "wide")


def test_one_method_against_each_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the average of two runs; differences are those of the means, paired by sample."""
    folders = []
    for name, samples in (("a", 3), ("b", 2)):
        store = Store.create(tmp_path / name, plan(samples=samples))
        pipeline.run(store, STAGES[:3], quiet, lambda plan, methods: Scripted(methods))
        folders.append(str(store.folder))
    assert main(["eval", "compare", *folders, "--method", "snapkv"]) == 0
    shown = capsys.readouterr().out
    # The full cache finds everything, the methods nothing.
    assert "| full | -100.0 | -100.0 | 5 |" in shown
    assert "| streaming | +0.0 | +0.0 | 5 |" in shown
    assert main(["eval", "compare", *folders, "--method", "snapkv", "--csv"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("over,metric,method,other,keep,runs,tasks,n,mean,reference")
    assert rows[1].startswith("needle,score,snapkv,full,0.5,2,2,5,0.0,100.0,-100.0")
    assert main(["eval", "compare", *folders, "--method", "best"]) == 2
    assert "there are: full, snapkv, streaming" in capsys.readouterr().err
