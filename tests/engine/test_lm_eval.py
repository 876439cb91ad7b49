"""lm-evaluation-harness runs the compressed engine through its own vLLM backend, unchanged."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from uncomp.eval import lm_eval_cli
from uncomp.eval.run.prompts import Renderer
from uncomp.eval.tasks.base import Wanted
from uncomp.eval.tasks.needle import TASKS

COUNT = 4


@pytest.fixture
def task(demo_model: Path, tmp_path: Path) -> Path:
    """A generation task of lm-eval's over a local file, as docs/eval.md shows it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    samples = TASKS[0].build(Wanted(512, COUNT, 0, tokenizer)).samples
    renderer = Renderer(tokenizer, 1024, chat=False)
    rows = [
        {
            "prompt": tokenizer.decode(list(renderer.prompt(sample, 0).ids)),
            "number": sample.turns[0].references[0],
        }
        for sample in samples
    ]
    data = tmp_path / "needle.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    described = {
        "task": "my_needle",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{number}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16},
        "filter_list": [
            {
                "name": "number",
                "filter": [
                    {"function": "regex", "regex_pattern": "(\\d{7})"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match"}],
    }
    file = tmp_path / "my_needle.yaml"
    file.write_text(yaml.safe_dump(described))
    return file


def test_generation_task(
    demo_model: Path,
    served_dtype: str,
    task: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    trace = tmp_path / "trace"
    arguments: dict[str, Any] = {
        "pretrained": str(demo_model),
        "dtype": served_dtype,
        "max_model_len": 1024,
        "add_bos_token": False,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 400_000_000,
        "additional_config": {"uncomp": {"keep": 0.5, "trace": str(trace)}},
    }
    output = tmp_path / "output"
    words = ["run", "--model", "vllm", "--model_args", json.dumps(arguments), "--tasks", str(task)]
    words += ["--batch_size", "auto", "--output_path", str(output)]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words])
    lm_eval_cli.main()
    [file] = output.rglob("results_*.json")
    found = json.loads(file.read_text())
    assert found["results"]["my_needle"]["exact_match,number"] >= 0.5
    records = (trace / "kept-0.jsonl").read_text().splitlines()
    assert len(records) == COUNT  # every prompt was compacted
