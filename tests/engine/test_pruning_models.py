"""Pruning of other model families, by the same hooks; and none at all: stock vLLM's answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Ask, running
from reference import Reference
from traffic import Source

SETTINGS: dict[str, Any] = {
    "keep": 1.0,
    "prefill_keep": 0.5,
    "prefill_stages": "1,3",
    "prefill_floor": 96,
    "window": 16,
    "pooling_kind": "ema",  # no tokenizer
}
ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 50_000_000,
}


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Mistral"])
def test_answers_are_those_of_a_model_that_masks_what_stopped(tmp_path: Path, family: str) -> None:
    import transformers

    torch.manual_seed(3)
    # Weights large enough for attention to have favourites.
    config = getattr(transformers, f"{family}Config")(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.15,
        max_position_embeddings=512,
        sliding_window=None,
    )
    model = tmp_path / "model"
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(model)
    random = torch.Generator().manual_seed(5)
    prompts = [torch.randint(1, 500, (n,), generator=random).tolist() for n in (60, 300, 420)]
    asks = [Ask(str(len(p)), tuple(p), tokens=12) for p in prompts]
    settings = {**SETTINGS, "trace": str(tmp_path)}
    with running(model, settings, **ARGUMENTS, skip_tokenizer_init=True) as engine:
        answers = engine.serve(asks)
        pruned = {name: engine.pruned(group[0].request_id) for name, group in answers.items()}
    assert [len(records) for records in pruned.values()] == [0, 1, 1]
    reference = Reference(model, torch.float32)
    for name, [answer] in answers.items():
        expected = reference.logprobs(answer.prompt, answer.tokens, (), pruned[name])
        whole = reference.logprobs(answer.prompt, answer.tokens)
        assert (float((expected - whole).abs().max()) > 0.05) == bool(pruned[name])
        for row, step in zip(expected, answer.logprobs, strict=True):
            for token, logprob in step.items():
                assert logprob == pytest.approx(float(row[token]), abs=5e-4), name


def test_a_fraction_of_one_is_stock_vllm(demo_model: Path) -> None:
    source = Source(demo_model)
    asks = [Ask(str(n), source.take(n), tokens=16) for n in (40, 200, 333)]
    given = {**ARGUMENTS, "kv_cache_memory_bytes": 300_000_000}
    with running(demo_model, None, **given) as engine:
        stock = engine.serve(asks)
    settings = {**SETTINGS, "prefill_stages": "3,9", "prefill_keep": 1.0}
    with running(demo_model, settings, **given) as engine:
        ours = engine.serve(asks)
        assert engine.counters()["prompts_pruned"] == 0
    for name, [answer] in stock.items():
        assert answer.tokens == ours[name][0].tokens
        assert answer.logprobs == ours[name][0].logprobs
