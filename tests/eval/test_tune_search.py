"""The search on an engine whose loss is known: what it finds, asks, repeats and writes."""

from __future__ import annotations

import csv
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from letters import Letters

from uncomp.cli import main, settings
from uncomp.cli import tune as command
from uncomp.config import UncompConfig
from uncomp.eval.engines.base import Answer, Ask, EngineError
from uncomp.eval.methods import Method
from uncomp.eval.run import pipeline
from uncomp.eval.run.plan import Plan, PlanError
from uncomp.eval.tasks.teacher_forcing import TokenRecord
from uncomp.eval.tune.bounds import Bounds
from uncomp.eval.tune.options import Options
from uncomp.eval.tune.race import IN, OUT, UNDECIDED, Outcome
from uncomp.eval.tune.result import Result
from uncomp.eval.tune.run import tune
from uncomp.eval.tune.search import search
from uncomp.eval.tune.space import Setting, Space, SpaceError, keep_grid
from uncomp.eval.tune.speed import compare

#: keep ratio from which on a policy loses nothing; below it loses all of what it lacks
NEEDS = {"entropy": 0.35, "uniform": 0.5, "adakv": 0.15, "random": 2.0}
KEEPS = keep_grid(0.0625, 1.0, 13)


class Known:
    """Says "yes", but for a share of the prompts that grows with what a policy lacks."""

    tokenizer, max_model_len, compresses = Letters(), 8192, True

    def __init__(self, life: int = 10**9, short: bool = False) -> None:
        self.short = short
        self.life, self.asked, self.closed = life, list[Ask](), False
        self.now = 0.0

    def facts(self) -> dict[str, Any]:
        return {
            "engine": "known",
            "model": "org/m",
            "block_size": 16,
            "blocks": 1001,
            "kv_bytes_per_token": 1000,
        }

    def answer(self, groups: Sequence[Sequence[Ask]]) -> Iterator[Answer]:
        first = groups[0][0]
        self.now += first.max_tokens * (0.25 if "kv_keep" in first.extra else 0.5)
        for group in groups:
            assert len({tuple(ask.prompt) for ask in group}) == 1
            for ask in group:
                if len(self.asked) == self.life:
                    raise EngineError("died")
                self.asked.append(ask)
                yield self._answer(ask)

    def _answer(self, ask: Ask) -> Answer:
        keep = ask.extra.get("kv_keep")
        kept = None
        if keep is not None:
            kept = {"compactions": 0, "full_tokens": 0, "kept_tokens": 0}
        if keep is not None and not self.short:
            kept = {"compactions": 1, "full_tokens": 10000, "kept_tokens": int(9000 * keep)}
        right = True
        if keep is not None:
            lacks = max(0.0, NEEDS[ask.extra["kv_policy"]] - keep)
            right = random.Random(str(list(ask.prompt))).random() >= 2 * lacks
        if ask.forced:
            best = [t if right or i else t + 1 for i, t in enumerate(ask.forced)]
            records = tuple(TokenRecord(-0.5, (b,), (-0.5,)) for b in best)
            return Answer(ask.key, "", len(ask.forced), "length", 0.0, kept, records)
        tokens = ask.max_tokens if ask.ignore_eos else 2
        return Answer(ask.key, " Yes." if right else " No.", tokens, "stop", 0.0, kept)

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "load_tokenizer", lambda plan: Letters())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "my.jsonl"
    rows = [{"prompt": f"Question {i}: yes?", "references": "yes"} for i in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(data: Path | None, **changes: Any) -> Options:
    given: dict[str, Any] = {
        "model": "m",
        "data": data,
        "space": Space(("entropy", "uniform", "adakv"), (15, 7), (8, 32), KEEPS),
        "max_loss": 3,
        "trials": 24,
        "chat": False,
        "engine": {},
        "speed": False,
    }
    return Options(**{**given, **changes})


def run(options: Options, folder: Path, engines: list[Known], life: int = 10**9) -> Result:
    def start(plan: Plan, methods: Sequence[Method]) -> Known:
        assert {m.name for m in methods} >= {"full", "adakv-p7-w32"}
        engines.append(Known(life))
        return engines[-1]

    return tune(options, folder, lambda text: None, start)


@pytest.mark.parametrize("seed", range(3))
def test_the_smallest_setting_within_the_limit_is_found(
    data: Path, tmp_path: Path, seed: int
) -> None:
    """Of 156 settings 24 are tried. The smallest at which adakv loses nothing is 0.1575; one step
    below it loses 5 of 100 on average."""
    engines: list[Known] = []
    result = run(options(data, seed=seed), tmp_path / "run", engines)
    assert result.chosen is not None
    assert result.chosen.setting.policy == "adakv"
    assert result.chosen.setting.keep == min(keep for keep in KEEPS if keep >= 0.15) == 0.1575
    # What the engine says it kept, not what was asked for.
    assert result.chosen.keep == pytest.approx(0.9 * 0.1575, abs=1e-4)
    assert len(result.outcomes) == len({o.setting for o in result.outcomes}) == 24


def test_settings_are_stopped_as_soon_as_they_are_decided(data: Path, tmp_path: Path) -> None:
    engines: list[Known] = []
    result = run(options(data), tmp_path / "run", engines)
    asked = Counter(
        tuple(str(ask.extra.get(name)) for name in ("kv_policy", "kv_settings", "kv_keep"))
        for ask in engines[0].asked
    )
    assert max(asked.values()) <= 300
    assert len(engines[0].asked) == sum(o.loss.n for o in result.outcomes) + result.full_n
    hopeless = [o for o in result.outcomes if NEEDS[o.setting.policy] - o.setting.keep > 0.2]
    assert hopeless
    assert {(o.verdict, o.loss.n, o.early) for o in hopeless} == {(OUT, 60, True)}
    harmless = [o for o in result.outcomes if o.setting.keep >= NEEDS[o.setting.policy]]
    # 175 samples without a loss show 3 points at the level of one of five looks: the third look.
    assert {(o.verdict, o.loss.n, o.early) for o in harmless} == {(IN, 180, True)}


def test_same_command_same_search_and_nothing_twice(data: Path, tmp_path: Path) -> None:
    engines: list[Known] = []
    with pytest.raises(EngineError, match="died"):
        run(options(data), tmp_path / "run", engines, life=1000)
    assert engines[0].closed
    first = run(options(data), tmp_path / "run", engines)
    keys = [ask.key for engine in engines for ask in engine.asked]
    assert len(keys) == len(set(keys))
    again = run(options(data), tmp_path / "run", engines)
    assert len(engines) == 2  # nothing left to ask: no engine is started
    other = run(options(data), tmp_path / "other", engines)
    assert first.outcomes == again.outcomes == other.outcomes
    more = run(options(data, trials=28), tmp_path / "run", engines)
    assert [o.setting for o in more.outcomes[:24]] == [o.setting for o in first.outcomes]
    with pytest.raises(PlanError, match=r"another search \(max_loss: 3 there, 1 asked\)"):
        run(options(data, max_loss=1), tmp_path / "run", engines)
    data.write_text(data.read_text() + '{"prompt": "more"}\n')
    with pytest.raises(PlanError, match="holds another run"):
        run(options(data), tmp_path / "run", engines)


def test_result_files(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[Known] = []
    clock = partial(compare, clock=lambda: engines[-1].now)
    monkeypatch.setattr("uncomp.eval.tune.run.compare", clock)
    given = options(data, user_tokens=1600, speed=True)
    result = run(given, tmp_path / "r", engines)
    chosen = result.chosen
    assert chosen is not None
    served = settings.validate(settings.read_yaml(str(tmp_path / "r" / "settings.yaml")))
    assert served == chosen.setting.config()
    text = (tmp_path / "r" / "settings.yaml").read_text()
    assert "kept 0.1417 of the KV bytes, measured" in text
    assert "on my.jsonl" in text
    with open(tmp_path / "r" / "tune.csv", newline="") as file:
        rows = {row["setting"]: row for row in csv.DictReader(file)}
    assert len(rows) == 25
    row, full = rows[chosen.setting.name], rows["full cache"]
    assert float(row["bytes_per_token"]) == pytest.approx(1000 * chosen.keep)
    # 1000 blocks; 100 for a whole user, 16 for 252 of 1600 tokens.
    assert (full["users"], row["users"]) == ("10", str(1 + 900 // 16))
    assert (row["chosen"], row["verdict"], row["samples"]) == ("True", IN, "180")
    # Eight at a time, 0.25 s a token; only those of the front are timed.
    assert float(row["tokens_per_s"]) == 8 / 0.25
    assert float(row["full_tokens_per_s"]) == 8 / 0.5
    assert all(bool(r["tokens_per_s"]) == (r["pareto"] == "True") for r in rows.values())
    assert run(given, tmp_path / "r", engines).speeds == result.speeds
    assert len(engines) == 1  # throughput is not measured again
    document = json.loads((tmp_path / "r" / "result.json").read_text())
    assert document["chosen"] == chosen.setting.name
    assert document["facts"]["data"][0]["name"] == "my.jsonl"
    table = result.markdown()
    assert f"**{chosen.setting.name}**" in table
    assert "24 settings were compared" in table
    assert "32 (32 to 32), full 16" in table
    assert "not below the limit" in table  # 180 samples do not allow for 24 comparisons
    assert all(o.corrected is not None and o.corrected > o.loss.upper for o in result.outcomes)


def test_what_was_never_compressed_is_not_chosen(data: Path, tmp_path: Path) -> None:
    engine = Known(short=True)
    given = options(data, trials=4, space=Space(("adakv",), keeps=KEEPS[6:]))
    result = tune(given, tmp_path / "run", lambda text: None, lambda *_: engine)
    assert {(o.keep, o.verdict) for o in result.outcomes} == {(1.0, IN)}
    assert result.chosen is None
    assert "Nothing was ever dropped" in result.markdown()
    assert "min_tokens=256" in result.markdown()


def test_too_few_samples_are_said_and_show_nothing(data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    engine = Known()
    result = tune(
        options(data, samples=50, trials=6), tmp_path / "run", said.append, lambda *_: engine
    )
    assert any("50 samples are too few" in text and "takes 175" in text for text in said)
    assert result.chosen is None
    assert UNDECIDED in {o.verdict for o in result.outcomes}
    assert "No setting is shown to lose less than 3. Closest: " in result.markdown()
    assert "175 are needed" in result.markdown()
    assert not (tmp_path / "run" / "settings.yaml").exists()


def test_rows_without_references_are_compared_with_the_full_cache(tmp_path: Path) -> None:
    path = tmp_path / "open.jsonl"
    rows = [{"prompt": f"Tell me of {i}."} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    engines: list[Known] = []
    result = run(options(path, max_loss=9, trials=12), tmp_path / "run", engines)
    forced = [ask for ask in engines[0].asked if ask.forced]
    assert {ask.forced for ask in forced} == {tuple(map(ord, " Yes."))}
    # The answers once, then one forced request per sample and case.
    assert len(engines[0].asked) - len(forced) == 60
    assert result.full == 1.0
    lossy = [o for o in result.outcomes if NEEDS[o.setting.policy] - o.setting.keep > 0.2]
    # The first of five tokens differs in 40 % of the samples and more.
    assert all(0.05 < o.loss.mean <= 0.2 for o in lossy)
    run(options(path, max_loss=9, trials=12), tmp_path / "run", engines)
    assert len(engines) == 1


def test_built_in_tasks(tmp_path: Path) -> None:
    given = options(None, tasks=("likelihood/needle",), lengths=(1024,), samples=4)
    result = tune(given, tmp_path / "run", lambda text: None, lambda *_: Known())
    assert result.samples == 4
    assert result.facts["data"][0]["sha256"]


def test_command_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "start_engine", lambda plan, methods: Known())
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # put back after the test
    common = ["tune", "m", "--data", str(data), "--no-chat", "--no-speed", "--trials", "8"]
    found = main([*common, "--max-loss", "3", "--out", str(tmp_path / "a")])
    assert found == 0
    assert capsys.readouterr().out.startswith("| setting | kept |")
    none = main([*common, "--max-loss", "0.1", "--out", str(tmp_path / "b")])
    assert none == 1
    assert "No setting is shown" in capsys.readouterr().out
    assert main([*common, "--max-loss", "3", "--keep", "1:2"]) == 2
    assert "must be LOW:HIGH:STEPS" in capsys.readouterr().err
    assert main([*common, "--max-loss", "0"]) == 2
    assert main([*common, "--max-loss", "3", "--policies", "uncomp-v1"]) == 2
    assert "is a preset" in capsys.readouterr().err
    assert main(["tune", "m", "--max-loss", "3"]) == 2
    assert "either --data FILE or --tasks" in capsys.readouterr().err


def test_default_space_is_served_by_one_engine() -> None:
    """The engine remembers as many queries as the widest window needs."""
    import argparse

    from uncomp.eval.methods import find, server_settings

    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    given = command.options(
        parser.parse_args(["tune", "m", "--tasks", "needle", "--max-loss", "1"])
    )
    methods = given.space.methods()
    server = UncompConfig.from_mapping(server_settings(find(methods, methods)))
    assert server.window == max(given.space.windows) == 32
    assert (given.space.keeps[0], given.space.keeps[-1]) == (0.03125, 0.84)


def test_space() -> None:
    space = Space(("random", "adakv"), (15, 7), (8,), (0.25, 0.5))
    # Random scores are not pooled: one setting, not two.
    assert len(space.all()) == 2 + 4
    for bad, says in (
        ({"policies": ("best",)}, "unknown policy 'best'"),
        ({"poolings": (0,)}, "pooling=0: must be between 1 and 1024"),
        ({"windows": ()}, "at least one value"),
        ({"keeps": (2.0,)}, r"keep=2\.0"),
    ):
        with pytest.raises(SpaceError, match=says):
            Space(**{"keeps": (0.5,), **bad})  # type: ignore[arg-type]
    with pytest.raises(SpaceError, match="0 < low < high"):
        keep_grid(0.5, 0.25, 3)
    assert keep_grid(0.125, 0.5, 3) == (0.125, 0.25, 0.5)


def test_a_small_space_is_tried_once_and_whole() -> None:
    space = Space(("random", "adakv"), (15, 7), (8,), (0.25, 0.5))
    tried: list[Setting] = []

    def try_all(settings: Sequence[Setting]) -> list[Outcome]:
        tried.extend(settings)
        loss = Bounds(0.0, -0.1, 0.1, 10, "")
        return [Outcome(s, UNDECIDED, loss, 1.0, 1.0, s.keep, 1, False) for s in settings]

    found = search(space, try_all, 0.01, trials=100, parallel=4, seed=0)
    assert [outcome.setting for outcome in found] == tried
    assert sorted(tried, key=str) == sorted(space.all(), key=str)
