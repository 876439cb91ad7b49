"""The default policy holds what it was chosen for: here too, an eighth of the bytes is enough."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

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
def scores(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, float]:
    """Share of the asked-for numbers that are in the answer, mean over all samples, by case."""
    plan = Plan(
        model=str(demo_model),
        tasks=TASKS,
        lengths=(LENGTH,),
        samples=SAMPLES,
        methods=("uncomp", "snapkv", "random"),
        keeps=(KEEP,),
        engine={
            "dtype": "float32",
            "max_model_len": LENGTH + 256,
            "enforce_eager": True,
            "block_size": 32,
            "kv_cache_memory_bytes": 1_500_000_000,
        },
    )
    store = Store.create(tmp_path_factory.mktemp("quality") / "run", plan)
    pipeline.run(store, ["prepare", "predict", "score"], print)
    found: dict[Case, list[float]] = {}
    for score in store.scores():
        if score.metric == "all_references":
            found.setdefault(score.case, []).append(score.value)
    assert {len(values) for values in found.values()} == {len(TASKS) * SAMPLES}
    means = {case: sum(values) / len(values) for case, values in found.items()}
    print(means)
    return means


def test_an_eighth_of_the_bytes_answers_as_the_full_cache(scores: dict[Case, float]) -> None:
    assert scores[Case("full")] >= 0.5, "the model itself fails: nothing can be compared"
    assert scores[Case("uncomp", KEEP)] >= scores[Case("full")] - 0.1


def test_baselines_lose_what_the_default_keeps(scores: dict[Case, float]) -> None:
    assert scores[Case("random", KEEP)] <= scores[Case("uncomp", KEEP)] - 0.25
    assert scores[Case("snapkv", KEEP)] <= scores[Case("uncomp", KEEP)] - 0.1
