"""Two ranks: each deals the heads it has, both keep the same blocks, together they are one model.

Tensor parallel ranks share every layer's heads, pipeline parallel ranks (stages) the layers.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Ask, Engine
from reference import Reference
from traffic import OFF

RANKS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2, "max_num_batched_tokens": 1024},
    # vLLM's CPU stages get their receive buffers in the warm-up, which an eager engine skips.
    "pipeline": {
        "pipeline_parallel_size": 2,
        "enforce_eager": False,
        "compilation_config": {"backend": "eager"},
    },
}
SETTINGS = {"policy": "entropy", "keep": 0.25, "min_tokens": 64, "recompact_every": 32}
SETTINGS |= {"groups": 4, "ratio": 4, "window": 8, "pooling_kind": "ema"}  # no tokenizer
#: tensor ranks add their heads' scores up before they choose; pipeline stages cannot prune
PRUNING = {"prefill_keep": 1.0, "prefill_stages": "1", "prefill_floor": 96}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with four KV heads; weights large enough for attention to have favourites."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        initializer_range=0.15,
        max_position_embeddings=1024,
    )
    folder = tmp_path_factory.mktemp("random")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a core for each rank")
@pytest.mark.parametrize(
    ("kind", "shares"),
    [("tensor", "policy"), ("tensor", "pyramid"), ("pipeline", "policy")],
    ids=["tensor", "tensor, layers share", "pipeline"],
)
def test_two_ranks_answer_as_the_masked_reference(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, shares: str
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    random = torch.Generator().manual_seed(5)
    prompts = [torch.randint(1, 500, (n,), generator=random).tolist() for n in (60, 300, 420)]
    asks = [Ask(f"{len(p)} tokens", tuple(p), tokens=40) for p in prompts]
    asks.append(Ask("off", asks[1].prompt[:150], tokens=10, extra=OFF))
    settings: dict[str, Any] = {**SETTINGS, "shares": shares, "trace": str(tmp_path)}
    if kind == "tensor":
        settings |= PRUNING
        asks.append(Ask("pruned", asks[2].prompt, tokens=40, extra={"kv_prefill_keep": 0.5}))
    engine = Engine(
        model,
        settings,
        dtype="float32",
        max_model_len=1024,
        kv_cache_memory_bytes=50_000_000,
        distributed_executor_backend="mp",
        skip_tokenizer_init=True,
        **RANKS[kind],
    )
    try:
        answers = engine.serve(asks)
        reports = engine.llm.collective_rpc("uncomp_report")
        assert [report["rank"] for report in reports] == [0, 1]
        assert reports[0]["orders_run"] == reports[1]["orders_run"] >= 5
        assert engine.leftovers() == {}
    finally:
        engine.close()
    reference = Reference(model, torch.float32)
    unequal = False
    chosen = []
    for name, [answer] in answers.items():
        ranks = [read(tmp_path / f"kept-{rank}.jsonl", answer.request_id) for rank in range(2)]
        trace = []
        for records in zip(*ranks, strict=True):
            parts = [r["kept"] for r in records]
            if kind == "tensor":
                kept = [a + b for a, b in zip(*parts, strict=True)]
            else:
                kept = parts[0] + parts[1]
            trace.append({**records[0], "kept": kept})
            # All ranks free the same blocks, so all keep the same number of entries in a layer.
            sums = [[sum(map(len, heads)) for heads in r["kept"]] for r in records]
            assert sums[0] == sums[1]
            among = kept if shares == "policy" else [[head for heads in kept for head in heads]]
            unequal |= any(len({len(head) for head in heads}) > 1 for heads in among)
        pruned = [read(tmp_path / f"pruned-{rank}.jsonl", answer.request_id) for rank in range(2)]
        assert pruned[0] == pruned[1]
        chosen += [name] * len(pruned[0])
        expected = reference.logprobs(answer.prompt, answer.tokens, trace, pruned[0])
        uncompressed = reference.logprobs(answer.prompt, answer.tokens)
        distance = full = 0.0
        for row, plain, step in zip(expected, uncompressed, answer.logprobs, strict=True):
            for token, logprob in step.items():
                distance = max(distance, abs(logprob - float(row[token])))
                full = max(full, abs(logprob - float(plain[token])))
        assert distance < 5e-4, name
        assert (full > 0.05) == bool(trace), name
    assert unequal
    assert chosen == ["pruned"] * (kind == "tensor")


def read(path: Path, request_id: str) -> list[dict]:
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if record["request_id"] == request_id]
