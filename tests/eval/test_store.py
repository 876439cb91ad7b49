"""A run's folder: resumable, never overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from uncomp.eval.run.plan import Plan, PlanError
from uncomp.eval.run.records import Case, Prediction, Scored
from uncomp.eval.run.store import Store
from uncomp.eval.tasks.base import Sample, Turn

PLAN = Plan(model="m", tasks=("needle",), lengths=(512,))
SAMPLE = Sample(
    "t", "1", "f1", "text", (Turn("Who?", ("me",), stop=("\n",)),), facts={"depth": 0.5}
)
PREDICTION = Prediction("t", "1", 0, Case("snapkv", 0.25), "me", 10, 0, 2, 5, 20, 1)
SCORE = Scored("t", "1", 0, Case("full"), "f1", 1.0, facts={"length": 512})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "run", PLAN)


def test_everything_comes_back(store: Store) -> None:
    assert store.samples() is None
    store.write_samples([SAMPLE])
    with store.predicting() as file:
        file.add(PREDICTION)
    store.write_scores([SCORE])
    store.add_facts(a=1)
    store.add_facts(b=[2])
    again = Store(store.folder)
    assert again.plan == PLAN
    assert again.samples() == [SAMPLE]
    assert list(again.predictions()) == [PREDICTION]
    assert again.scores() == [SCORE]
    assert again.facts() == {"a": 1, "b": [2]}


def test_same_plan_goes_on_in_the_same_folder(store: Store) -> None:
    store.write_samples([SAMPLE])
    assert Store.create(store.folder, PLAN).samples() == [SAMPLE]


def test_another_plan_is_refused_and_nothing_changes(store: Store) -> None:
    store.write_samples([SAMPLE])
    with pytest.raises(PlanError, match=r"samples: 20 there, 3 asked.*choose another --out"):
        Store.create(store.folder, Plan(model="m", tasks=("needle",), lengths=(512,), samples=3))
    assert Store(store.folder).samples() == [SAMPLE]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(PlanError, match="is not empty and holds no run"):
        Store.create(tmp_path, PLAN)
    with pytest.raises(PlanError, match="holds no run: start one"):
        Store(tmp_path)


@pytest.mark.parametrize("half", ['{"task": "t", "sam', "", "\x00\x00"])
def test_a_line_cut_off_by_a_kill_does_not_count(store: Store, half: str) -> None:
    path = store.folder / "predictions.jsonl"
    with store.predicting() as file:
        file.add(PREDICTION)
    with open(path, "a") as raw:
        raw.write(half)
    assert list(store.predictions()) == [PREDICTION]
    with store.predicting() as file:
        file.add(PREDICTION)
    assert list(store.predictions()) == [PREDICTION, PREDICTION]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_only_one_process_works_on_a_run(store: Store) -> None:
    with (
        store.alone(),
        pytest.raises(PlanError, match="another process works on this run"),
        Store(store.folder).alone(),
    ):
        pass


def test_names_of_plans_differ_by_everything_that_matters() -> None:
    others = [
        Plan(model="m", tasks=("needle",), lengths=(512,), **{name: value})  # type: ignore[arg-type]
        for name, value in {"seed": 1, "chat": False, "keeps": (0.5,), "samples": 3}.items()
    ]
    names = {plan.name() for plan in (PLAN, *others)}
    assert len(names) == 5
    assert all(name.startswith("m-needle-") for name in names)
    assert Plan.from_dict(json.loads(json.dumps(PLAN.to_dict()))) == PLAN


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": ()}, "no task"),
        ({"lengths": (10,)}, "at least 64"),
        ({"samples": 0}, "at least 1"),
        ({"keeps": (0.5, 1.5)}, "ratios in"),
        ({"top_logprobs": 0}, "between 1 and 1000"),
    ],
)
def test_plans_that_cannot_be_run(changes: dict[str, object], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        Plan(model="m", **changes)  # type: ignore[arg-type]
