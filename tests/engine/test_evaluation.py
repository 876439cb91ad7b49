"""The evaluation on a real engine, at toy size: what it measures moves when the cache is harmed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from uncomp import policies
from uncomp.eval.engines.local import LocalEngine
from uncomp.eval.methods import Method
from uncomp.eval.run import pipeline
from uncomp.eval.run.plan import Plan
from uncomp.eval.run.prompts import Renderer
from uncomp.eval.run.records import Case
from uncomp.eval.run.store import Store
from uncomp.policies import LayerView, Policy, registry

LENGTH, SAMPLES = 704, 3


@dataclass
class Sabotage(Policy):
    """Keeps what SnapKV keeps, but for one span of the prompt: what is asked for."""

    name = "sabotage"
    needs_queries = True
    #: tokens of a prompt -> the span that is dropped
    spans: ClassVar[dict[int, tuple[int, int]]] = {}

    def score(self, view: LayerView) -> Tensor:
        scores = policies.get("uniform").score(view)
        start, end = self.spans[int(view.lengths[0])]
        inside = (view.positions >= start - 8) & (view.positions < end + 8)
        return torch.where(inside, torch.zeros_like(scores), scores + 1.0)


@pytest.fixture(scope="module", autouse=True)
def in_this_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        registry.register(Sabotage)
        yield
        registry._POLICIES.pop(Sabotage.name)


class Counting(LocalEngine):
    """Counts what it was asked."""

    asked = 0

    def _send(self, ask: Any, sent: Any) -> None:
        type(self).asked += 1
        super()._send(ask, sent)


def start(plan: Plan, methods: Sequence[Method]) -> LocalEngine:
    settings = {"keep": 1.0, "min_tokens": 64}
    return Counting(plan.model, settings, dict(plan.engine), plan.top_logprobs)


@pytest.fixture(scope="module")
def store(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Needles and copying under the full cache, everything kept, SnapKV and sabotage."""
    plan = Plan(
        model=str(demo_model),
        tasks=("needle", "likelihood/repeat"),
        lengths=(LENGTH,),
        samples=SAMPLES,
        methods=("snapkv", "sabotage"),
        custom={"sabotage": {"policy": "sabotage"}},
        keeps=(1.0, 0.5),
        engine={
            "dtype": "float32",
            "max_model_len": LENGTH + 256,
            "enforce_eager": True,
            "block_size": 32,
            "kv_cache_memory_bytes": 1_500_000_000,
        },
    )
    store = Store.create(tmp_path_factory.mktemp("evaluation") / "run", plan)
    pipeline.run(store, ["prepare"], print)
    _find_spans(store, plan)
    pipeline.run(store, ["predict", "score"], print, start)
    return store


def _find_spans(store: Store, plan: Plan) -> None:
    renderer = Renderer(pipeline.load_tokenizer(plan), 1 << 20, plan.chat)
    for sample in store.samples() or ():
        prompt = renderer.prompt(sample, 0)
        # The number, or the passage that is to be copied (its ends may be other tokens there).
        wanted = prompt.forced[4:-4] or _tokens(renderer, sample.turns[0].references[0])
        length, end = len(prompt.ids), len(prompt.ids) - len(wanted)
        [at] = [i for i in range(end) if prompt.ids[i : i + len(wanted)] == wanted]
        assert length not in Sabotage.spans, "two prompts of one length: take another seed"
        Sabotage.spans[length] = (at, at + len(wanted))


def _tokens(renderer: Renderer, text: str) -> tuple[int, ...]:
    return tuple(renderer.tokenizer.encode(text, add_special_tokens=False))


def scores(store: Store, metric: str, case: Case) -> list[float]:
    found = sorted(
        (s.sample, s.value) for s in store.scores() if (s.metric, s.case) == (metric, case)
    )
    assert len(found) == SAMPLES
    return [value for _, value in found]


def test_a_policy_that_drops_the_needle_scores_near_zero(store: Store) -> None:
    assert sum(scores(store, "contains", Case("full"))) >= SAMPLES - 1
    assert sum(scores(store, "contains", Case("snapkv", 0.5))) >= SAMPLES - 1
    assert sum(scores(store, "contains", Case("sabotage", 0.5))) <= 1


@pytest.mark.parametrize("method", ["snapkv", "sabotage"])
def test_keeping_everything_is_the_full_cache(store: Store, method: str) -> None:
    texts: dict[Case, list[str]] = {}
    for p in sorted(store.predictions(), key=lambda p: (p.task, p.sample)):
        texts.setdefault(p.case, []).append(p.text)
    assert texts[Case(method, 1.0)] == texts[Case("full")]
    assert max(scores(store, "kl", Case(method, 1.0))) < 1e-3  # float32, other batches
    assert min(scores(store, "top1_agreement", Case(method, 1.0))) == 1.0


def test_likelihood_tells_a_harmed_cache_from_a_whole_one(store: Store) -> None:
    """A passage that was dropped cannot be copied: nats more for each of its tokens."""
    snapkv, sabotage = Case("snapkv", 0.5), Case("sabotage", 0.5)
    full = sum(scores(store, "nll", Case("full"))) / SAMPLES
    harmed = sum(scores(store, "nll", sabotage)) / SAMPLES
    assert harmed > full + 1.0
    assert min(scores(store, "kl", sabotage)) > 1.0
    # SnapKV harms it too (the window does not know what will be copied), but less.
    assert sum(scores(store, "kl", sabotage)) > sum(scores(store, "kl", snapkv))


def test_what_is_kept_is_measured(store: Store) -> None:
    kept: dict[Case, set[Any]] = {}
    for s in store.scores():
        kept.setdefault(s.case, set()).add(s.keep_measured)
    assert kept[Case("full")] == {1.0}
    assert kept[Case("snapkv", 1.0)] <= {1.0, None}
    assert all(0.5 <= ratio < 0.5 + 32 / 300 for ratio in kept[Case("snapkv", 0.5)])


def test_a_finished_run_asks_nothing_again(store: Store) -> None:
    before = Counting.asked
    assert before == 2 * SAMPLES * 5
    pipeline.run(store, ["predict", "score"], print, start)
    assert Counting.asked == before


def test_probabilities_are_those_of_the_model(store: Store, demo_model: Path) -> None:
    """Against transformers: the forced tokens' log-likelihood under the full cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    renderer = Renderer(pipeline.load_tokenizer(store.plan), LENGTH + 256, store.plan.chat)
    sample = next(s for s in store.samples() or () if s.task == "likelihood/repeat")
    prompt = renderer.prompt(sample, 0)
    ids = torch.tensor([[*prompt.ids, *prompt.forced]])
    with torch.inference_mode():
        logprobs = model(ids).logits[0, len(prompt.ids) - 1 : -1].log_softmax(-1)
    expected = logprobs.gather(1, ids[0, len(prompt.ids) :, None]).flatten().tolist()
    [found] = [
        p
        for p in store.predictions()
        if (p.task, p.sample, p.case) == (sample.task, sample.id, Case("full"))
    ]
    assert [record[0] for record in found.logprobs] == pytest.approx(expected, abs=1e-3)
