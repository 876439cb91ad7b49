"""Time to first token of pruned prompts: what leaving tokens out of later layers saves.

Two engines: stock vLLM as it comes (chunked prefill), and one that prunes prompts, whose requests
read their prompts whole or pruned, in turns. One request at a time, no prefix cache, no compaction.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from uncomp.config import UncompConfig
from uncomp.eval.bench.cpu import ARMS
from uncomp.eval.bench.engines import run_arm
from uncomp.eval.bench.rows import Row, judge

NAME = "prefill"
#: of the demo model, from `uncomp calibrate` (6 texts of 1,024 tokens)
DEMO_STAGES = "5,16,19,26"


@dataclass(frozen=True)
class Setting:
    """What to run.

    Attributes:
        model: checkpoint folder or hub name.
        stages: first layers of the stages after the first.
        lengths: prompt tokens.
        keeps: fractions that enter the last stage; 0.375 is the paper's.
        scores: what chooses the tokens.
        repeat: prompts of each kind.
        threads, dtype: see `uncomp.eval.bench.cpu`.
        bar: speed-up over whole prompts that 0.375 must reach.
    """

    model: str
    stages: str
    lengths: tuple[int, ...] = (4096, 8000)
    keeps: tuple[float, ...] = (0.75, 0.5, 0.375)
    scores: str = UncompConfig.prefill_scores
    repeat: int = 3
    threads: str = "0-1"
    dtype: str = "auto"
    bar: float = 1.3


def bench(setting: Setting, say: Callable[[str], None]) -> list[Row]:
    """Run both engines; ``say`` reports progress."""
    say("1/2 stock vLLM")
    stock = run_arm(_arm(setting, _runs(setting, {"stock": None}), None, ARMS["stock"][1]))
    say("2/2 pruned and whole prompts in turns")
    cases: dict[str, float | None] = {"whole": 1.0, **{f"keep {k}": k for k in setting.keeps}}
    settings = {
        "keep": 1.0,
        "prefill_keep": 1.0,
        "prefill_stages": setting.stages,
        "prefill_scores": setting.scores,
    }
    pruned = run_arm(_arm(setting, _runs(setting, cases), settings, {}))
    rows: list[Row] = []
    for length in setting.lengths:
        what = f"{length} tokens" + ("" if setting.dtype == "auto" else f" in {setting.dtype}")
        first = _seconds(stock, "stock", length, setting)
        rows.append(_row(f"{what}, stock vLLM", "time to first token", "s", first))
        whole = _seconds(pruned, "whole", length, setting)
        for name, keep in cases.items():
            case = f"{what}, {name}" + ("" if keep == 1 else f", stages at {setting.stages}")
            seconds = _seconds(pruned, name, length, setting)
            rows.append(_row(case, "time to first token", "s", seconds))
            share = _read(pruned, name, length, setting)
            rows.append(_row(case, "tokens times layers read", "%", [100 * share]))
            if share < 1:
                rows.append(
                    _row(case, "choosing tokens", "s", _choosing(pruned, name, length, setting))
                )
            bar = setting.bar if name == "keep 0.375" else None
            for other, base in (("stock vLLM", first), ("whole", whole)):
                if name == other:
                    continue
                ratio = [statistics.median(base) / one for one in seconds]
                least = bar if other == "stock vLLM" else None
                rows.append(_row(case, f"speed-up over {other}", "x", ratio, least))
    return rows


def _runs(setting: Setting, cases: dict[str, float | None]) -> list[dict[str, Any]]:
    """Every case in turn, so that a machine that drifts treats all alike."""
    return [
        {
            "name": f"{name}, {length}, {i}",
            "count": 1,
            "length": length,
            "max_tokens": 1,
            "extra_args": None if keep is None else {"kv_prefill_keep": keep},
        }
        for length in setting.lengths
        for i in range(setting.repeat)
        for name, keep in cases.items()
    ]


def _arm(
    setting: Setting,
    runs: list[dict[str, Any]],
    uncomp: dict[str, Any] | None,
    env: dict[str, str],
) -> dict[str, Any]:
    cores = len(setting.threads.split("-"))
    engine: dict[str, Any] = {
        "max_model_len": max(setting.lengths) + 64,
        "dtype": setting.dtype,
        "max_num_seqs": 4,
        "block_size": 32,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 2 << 30,
    }
    if uncomp is not None:
        engine["additional_config"] = {"uncomp": uncomp}
    threads = {"VLLM_CPU_OMP_THREADS_BIND": setting.threads, "OMP_NUM_THREADS": str(cores)}
    return {"model": setting.model, "engine": engine, "env": {**threads, **env}, "runs": runs}


def _repeats(arm: dict[str, Any], name: str, length: int, setting: Setting) -> list[dict[str, Any]]:
    return [arm[f"{name}, {length}, {i}"][0] for i in range(setting.repeat)]


def _seconds(arm: dict[str, Any], name: str, length: int, setting: Setting) -> list[float]:
    return [run["prefill_seconds"] for run in _repeats(arm, name, length, setting)]


def _read(arm: dict[str, Any], name: str, length: int, setting: Setting) -> float:
    counters = _repeats(arm, name, length, setting)[0]["counters"]
    whole = counters["prefill_token_layers"]
    return counters["prefill_token_layers_read"] / whole if whole else 1.0


def _choosing(arm: dict[str, Any], name: str, length: int, setting: Setting) -> list[float]:
    return [r["counters"]["choose_seconds"] for r in _repeats(arm, name, length, setting)]


def _row(
    setting: str, metric: str, unit: str, values: list[float], least: float | None = None
) -> Row:
    return judge(NAME, setting, metric, unit, values, least)
