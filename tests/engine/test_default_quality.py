"""What was chosen holds: an eighth of the bytes is enough for the default, and before the question
layers that share one budget keep what equal layers lose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from uncomp.calibration.collect import calibrate, load_model
from uncomp.calibration.text import default_texts
from uncomp.eval.run import pipeline
from uncomp.eval.run.plan import Plan
from uncomp.eval.run.records import Case
from uncomp.eval.run.store import Store

TASKS = ("ruler/niah_single_2", "ruler/niah_multikey_1", "ruler/niah_multiquery")
LENGTH, SAMPLES, KEEP = 1024, 2, 0.125


@pytest.fixture(scope="module", autouse=True)
def in_this_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        yield


@pytest.fixture(scope="module")
def calibration(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few texts and few tokens: what heads need is seen in them all the same."""
    model, tokenizer = load_model(str(demo_model), "cpu")
    file = tmp_path_factory.mktemp("calibration") / "smol.json"
    made = calibrate(model, tokenizer, str(demo_model), default_texts(), samples=3, tokens=512)
    made.save(file)
    return file


def _scores(folder: Path, **given: Any) -> dict[Case, float]:
    """Share of the asked-for numbers that are in the answer, mean over all samples, by case."""
    plan = Plan(
        tasks=TASKS,
        lengths=(LENGTH,),
        samples=SAMPLES,
        engine={
            "dtype": "float32",
            "max_model_len": LENGTH + 256,
            "enforce_eager": True,
            "block_size": 32,
            "kv_cache_memory_bytes": 1_500_000_000,
        },
        **given,
    )
    store = Store.create(folder / "run", plan)
    pipeline.run(store, ["prepare", "predict", "score"], print)
    found: dict[Case, list[float]] = {}
    for score in store.scores():
        if score.metric == "all_references":
            found.setdefault(score.case, []).append(score.value)
    assert {len(values) for values in found.values()} == {len(TASKS) * SAMPLES}
    means = {case: sum(values) / len(values) for case, values in found.items()}
    print(means)
    return means


@pytest.fixture(scope="module")
def scores(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, float]:
    folder = tmp_path_factory.mktemp("quality")
    methods = ("uncomp", "snapkv", "random")
    return _scores(folder, model=str(demo_model), methods=methods, keeps=(KEEP,))


@pytest.fixture(scope="module")
def before_question(
    demo_model: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[Case, float]:
    return _scores(
        tmp_path_factory.mktemp("before"),
        model=str(demo_model),
        methods=("hybrid", "hybrid-calibrated", "pyramidkv"),
        keeps=(KEEP,),
        calibration=str(calibration),
        query_agnostic=True,
    )


def test_an_eighth_of_the_bytes_answers_as_the_full_cache(scores: dict[Case, float]) -> None:
    assert scores[Case("full")] >= 0.5, "the model itself fails: nothing can be compared"
    assert scores[Case("uncomp", KEEP)] >= scores[Case("full")] - 0.1


def test_baselines_lose_what_the_default_keeps(scores: dict[Case, float]) -> None:
    assert scores[Case("random", KEEP)] <= scores[Case("uncomp", KEEP)] - 0.25
    assert scores[Case("snapkv", KEEP)] <= scores[Case("uncomp", KEEP)] - 0.1


def test_layers_that_share_keep_what_nobody_has_asked_for_yet(
    before_question: dict[Case, float],
) -> None:
    full, shared = before_question[Case("full")], "hybrid-calibrated"
    assert full >= 0.5, "the model itself fails: nothing can be compared"
    assert before_question[Case(shared, KEEP)] >= full - 0.2
    for other in ("hybrid", "pyramidkv"):
        assert before_question[Case(other, KEEP)] <= before_question[Case(shared, KEEP)] - 0.4
