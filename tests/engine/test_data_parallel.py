"""Two data-parallel engines behind one server: each compresses the requests that it is given."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from uncomp.cli.server import Server


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a core for each engine")
def test_each_engine_compresses_its_own_requests(demo_model: Path, tmp_path: Path) -> None:
    arguments = [
        str(demo_model), "--served-model-name", "m", "--kv-keep", "0.25", "--kv-min-tokens", "64",
        "--max-model-len", "1024", "--max-num-seqs", "4", "--enforce-eager",
        "--kv-cache-memory-bytes", "60000000", "--data-parallel-size", "2",
    ]  # fmt: skip
    environment = {
        "UNCOMP_METRICS_DIR": str(tmp_path / "metrics"),
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    }
    with Server(arguments, tmp_path / "log", environment) as server:
        text: dict[bool, set[str]] = {True: set(), False: set()}
        for engine in ("0", "1"):
            for compress in (True, False):
                body = {
                    "model": "m",
                    "prompt": [100 + (i * i * 7 + i * 31) % 20000 for i in range(512)],
                    "max_tokens": 8,
                    "temperature": 0,
                    "ignore_eos": True,
                    "vllm_xargs": {"kv_compress": compress},
                }
                answer = server.post("/v1/completions", body, {"X-data-parallel-rank": engine})
                text[compress].add(answer["choices"][0]["text"])
        assert [len(answers) for answers in text.values()] == [1, 1]
        found = server.get("/metrics")
    freed = re.findall(r'^uncomp:blocks_freed_total\{engine="(\d)".*\} ([\d.]+)$', found, re.M)
    assert freed == [("0", "12.0"), ("1", "12.0")]
