"""Pruned prompts on the real engine: what went on, what was attended to, what came back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import BLOCK, Answer, Ask, Engine, running
from reference import Reference
from traffic import Source

STARTS = (3, 9, 17, 25)
SETTINGS: dict[str, Any] = {
    "keep": 1.0,
    "prefill_keep": 1.0,
    "prefill_stages": "3,9,17,25",
    "prefill_floor": 96,
    "prefill_scores": "attention",
    "min_tokens": 64,
    "recompact_every": 32,
    "window": 16,
}
# The engine computes in float32 here, see test_equality.py.
TOLERANCE = 5e-4
ARGUMENTS = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_batched_tokens": 1024,
    "kv_cache_memory_bytes": 700_000_000,
}


@pytest.fixture(scope="module")
def engine(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    trace = str(tmp_path_factory.mktemp("trace"))
    with running(demo_model, {**SETTINGS, "trace": trace}, **ARGUMENTS) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(demo_model: Path) -> Reference:
    return Reference(demo_model, torch.float32)


@pytest.fixture(scope="module")
def source(demo_model: Path) -> Source:
    return Source(demo_model)


def _mixed(source: Source) -> list[Ask]:
    """Pruned by different fractions and scores, compressed, opted out: in one batch."""
    half = {"kv_prefill_keep": 0.5, "kv_report": True}
    other = {**half, "kv_settings": '{"prefill_scores": "handed-on"}'}
    return [
        Ask("pruned", source.take(401), tokens=40, extra=half),
        Ask("handed on", source.take(350), tokens=12, extra=other),
        Ask("compressed too", source.take(467), tokens=70, extra={**half, "kv_keep": 0.3}),
        Ask("protected", source.take(300), tokens=8, extra={**half, "kv_protect": "40:90"}),
        Ask("only compressed", source.take(280), tokens=12, extra={"kv_keep": 0.3}),
        Ask("whole", source.take(200), tokens=30),
        Ask("short", source.take(90), tokens=12, extra=half),
        Ask("in blocks", source.take(12 * BLOCK), tokens=40, extra={**half, "kv_keep": 0.3}),
    ]


@pytest.fixture(scope="module")
def answers(engine: Engine, source: Source) -> dict[str, Answer]:
    return {name: answer for name, [answer] in engine.serve(_mixed(source)).items()}


def _agrees(engine: Engine, reference: Reference, answer: Answer) -> None:
    expected = reference.logprobs(
        answer.prompt,
        answer.tokens,
        engine.trace(answer.request_id),
        engine.pruned(answer.request_id),
    )
    for i, step in enumerate(answer.logprobs):
        for token, logprob in step.items():
            assert abs(expected[i, token].item() - logprob) < TOLERANCE, (i, token)


@pytest.mark.parametrize(
    "name",
    [
        "pruned",
        "handed on",
        "compressed too",
        "protected",
        "only compressed",
        "whole",
        "short",
        "in blocks",
    ],
)
def test_answers_are_those_of_a_model_that_masks_what_stopped(
    engine: Engine, reference: Reference, answers: dict[str, Answer], name: str
) -> None:
    _agrees(engine, reference, answers[name])


def test_which_prompts_are_pruned(engine: Engine, answers: dict[str, Answer]) -> None:
    pruned = {name for name, a in answers.items() if engine.pruned(a.request_id)}
    assert pruned == {"pruned", "handed on", "compressed too", "protected", "in blocks"}


def test_fewer_tokens_go_on_from_stage_to_stage(engine: Engine, answers: dict[str, Answer]) -> None:
    answer = answers["pruned"]
    [record] = engine.pruned(answer.request_id)
    assert tuple(record["starts"]) == (0, *STARTS)
    # of 401: 0.875, 0.75, 0.625, 0.5 rounded up to 401 less whole blocks
    assert [len(kept) for kept in record["kept"]] == [401, 369, 305, 273, 209]
    for before, after in zip(record["kept"], record["kept"][1:], strict=False):
        assert set(after) < set(before)
    last = record["kept"][-1]
    assert last[:4] == [0, 1, 2, 3]
    assert last[-17:] == list(range(384, 401))  # the window of 16, and what follows the last block
    assert answer.facts is not None
    read = 3 * 401 + 6 * 369 + 8 * 305 + 8 * 273 + 5 * 209
    assert answer.facts["prefill_keep"] == pytest.approx(read / (30 * 401))


def test_protected_spans_go_on(engine: Engine, answers: dict[str, Answer]) -> None:
    [record] = engine.pruned(answers["protected"].request_id)
    assert set(range(40, 90)) <= set(record["kept"][-1])


def test_kept_tokens_are_those_the_last_queries_attend_to(
    engine: Engine, answers: dict[str, Answer], demo_model: Path
) -> None:
    """Chosen again by hand, from the attention weights of Hugging Face's own model."""
    from transformers import AutoModelForCausalLM

    answer = answers["pruned"]
    [record] = engine.pruned(answer.request_id)
    model = AutoModelForCausalLM.from_pretrained(
        demo_model, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        given = torch.tensor([answer.prompt])
        weights = model(given, output_attentions=True, use_cache=False).attentions
    total = len(answer.prompt)
    scores = weights[STARTS[0] - 1][0, :, -8:].sum((0, 1))
    scores[:4] = scores[-17:] = float("inf")
    best = scores.topk(len(record["kept"][1])).indices.tolist()
    assert len(set(best) & set(record["kept"][1])) >= 0.99 * len(best)
    assert total == 401


def test_pruned_blocks_are_nobody_elses(engine: Engine, source: Source) -> None:
    """Neither reads a pruned prompt blocks of others, nor others its."""
    prompt = source.take(450)
    whole = Ask("first whole", prompt, tokens=8)
    half = Ask("then pruned", prompt, tokens=8, extra={"kv_prefill_keep": 0.5})
    again = replace(half, name="pruned again")
    last = replace(whole, name="whole again")
    engine.forget()
    hits = engine.metric("prefix_cache_hits")
    alone = engine.serve([half])[half.name][0]
    engine.serve([again])
    assert engine.metric("prefix_cache_hits") == hits
    first = engine.serve([whole])[whole.name][0]
    assert engine.metric("prefix_cache_hits") == hits
    after = engine.serve([replace(half, name="pruned after whole")])["pruned after whole"][0]
    assert engine.metric("prefix_cache_hits") == hits
    second = engine.serve([last])[last.name][0]
    assert engine.metric("prefix_cache_hits") > hits
    assert after.tokens == alone.tokens
    assert second.tokens == first.tokens
    assert after.logprobs != first.logprobs


def test_preempted_prompts_are_pruned_again(
    engine: Engine, reference: Reference, source: Source
) -> None:
    half = {"kv_prefill_keep": 0.5}
    extras = [half, half, {**half, "kv_keep": 0.8}]
    asks = [
        Ask(f"p{i}", source.take(300 + 7 * i), tokens=60, extra=extra)
        for i, extra in enumerate(extras)
    ]
    before = engine.metric("num_preemptions")
    with engine.pool_of(23):
        answers = engine.serve(asks)
    assert engine.metric("num_preemptions") > before
    for [answer] in answers.values():
        _agrees(engine, reference, answer)


def test_prompts_wait_until_they_fit_into_a_step(engine: Engine, source: Source) -> None:
    half = {"kv_prefill_keep": 0.5}
    asks = [Ask(f"w{i}", source.take(350), tokens=8, extra=half) for i in range(3)]
    at_once = engine.serve(asks)
    with engine.chunks_of(400):
        one_by_one = engine.serve([replace(ask, name=f"{ask.name} alone") for ask in asks])
    for ask in asks:
        [together], [alone] = at_once[ask.name], one_by_one[f"{ask.name} alone"]
        assert together.tokens == alone.tokens
        [record] = engine.pruned(alone.request_id)
        assert len(record["kept"][0]) == 350


def test_choosing_is_timed(engine: Engine, source: Source) -> None:
    before = engine.counters()
    start = time.perf_counter()
    engine.serve([Ask("timed", source.take(300), tokens=2, extra={"kv_prefill_keep": 0.5})])
    most = time.perf_counter() - start
    after = engine.counters()
    assert after["prompts_pruned"] - before["prompts_pruned"] == 1
    assert 0 < after["choose_seconds"] - before["choose_seconds"] < most


def test_prompt_logprobs_need_every_token(engine: Engine, source: Source) -> None:
    from vllm import SamplingParams

    before = engine.counters()
    prompt = {"prompt_token_ids": list(source.take(300))}
    params = SamplingParams(
        max_tokens=1, prompt_logprobs=1, extra_args={"kv_prefill_keep": 0.5}, detokenize=False
    )
    [output] = engine.llm.generate(prompt, params, use_tqdm=False)
    assert len(output.prompt_logprobs) == 300
    after = engine.counters()
    assert after["refused_prompt_logprobs"] == before["refused_prompt_logprobs"] + 1
    assert after["prompts_pruned"] == before["prompts_pruned"]


def test_nothing_is_left_on_the_model(engine: Engine) -> None:
    """Steps that prune nothing run the model as vLLM has built it."""
    model = engine.core.model_executor.driver_worker.model_runner.get_model()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_everything_is_given_back(engine: Engine) -> None:
    assert engine.leftovers() == {}
