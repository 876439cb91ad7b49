"""vLLM with and without compression at Llama-3.1-8B's shape, dummy weights.

Every engine is a process of its own with a cap on its time. Answers of dummy weights mean nothing;
time and memory do not depend on the values.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from uncomp.eval.bench.engines import run_arm
from uncomp.eval.bench.gpu_scenarios import DRY, NAMES, REAL, Arms, Sizes
from uncomp.eval.bench.gpu_timing import row
from uncomp.eval.bench.rows import Row

Say = Callable[[str], None]
#: generated tokens per second over those of full KV
GAIN = 6.4
#: fractions of a prompt that enter the last layers; the first is the paper's
FRACTIONS = (0.375, 0.5)
#: prefill of the paper's fraction over stock vLLM's; the paper has 1.585 on an A100
SOONER = 1.5


def unusable(dry: bool) -> str:
    """Why the engine cannot run here; "" if it can. A dry run needs any vLLM."""
    try:
        from vllm.platforms import current_platform
    except Exception as error:
        return f"vLLM cannot be imported ({type(error).__name__}: {error})"
    if dry:
        return ""
    if not current_platform.is_cuda():
        return f"this vLLM is for {current_platform.device_name or 'another platform'}, not CUDA"
    return ""


def bench(only: list[str] | None, cap: float, dry: bool, say: Say) -> Iterator[list[Row]]:
    """Rows of each scenario; one that fails is a row without a value."""
    sizes = DRY if dry else REAL
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(sizes.config))
        runner = Runner(Arms(sizes, folder), cap, say)
        for name in only or NAMES:
            say(f"scenario {name}")
            try:
                yield SCENARIOS[name](runner)
            except RuntimeError as error:
                say(f"FAILED {name}: {error}")
                yield [row(name, "failed", "", [float("nan")], least=0.0)]


class Runner:
    """Runs arms and says what they found."""

    def __init__(self, arms: Arms, cap: float, say: Say) -> None:
        self.arms, self.sizes, self._cap, self.say = arms, arms.sizes, cap, say

    def __call__(self, name: str, arm: dict[str, Any]) -> dict[str, Any]:
        self.say(f"  engine: {name}")
        found = run_arm(arm, "uncomp.eval.bench.gpu_load", self._cap)
        facts = {k: found[k] for k in ("start_seconds", "blocks", "graphs", "async")}
        self.say(f"  {facts}")
        return found


def paper(runner: Runner) -> list[Row]:
    """2,048 in, 8,192 out, load above capacity, pool of 20 GiB."""
    sizes, arms = runner.sizes, runner.arms
    sides = {
        "full KV": arms.generating(None, sizes.pool),
        f"budget {sizes.budget}": arms.generating(sizes.budget, sizes.pool),
    }
    return _generating(runner, _pool(sizes), sides, GAIN)


def paper_fp8(runner: Runner) -> list[Row]:
    """The same against an FP8 cache in the same pool, and with one."""
    sizes, arms = runner.sizes, runner.arms
    sides = {
        "full KV in FP8": arms.generating(None, sizes.pool, fp8=True),
        f"budget {sizes.budget}": arms.generating(sizes.budget, sizes.pool),
        f"budget {sizes.budget} in FP8": arms.generating(sizes.budget, sizes.pool, fp8=True),
    }
    return _generating(runner, _pool(sizes), sides, None)


def paper_whole(runner: Runner) -> list[Row]:
    """The same with all memory that vLLM takes."""
    sizes, arms = runner.sizes, runner.arms
    pool, expected = (None, _free_for_cache()) if sizes is REAL else (2 * sizes.pool, 0)
    sides = {
        "full KV": arms.generating(None, pool, expected=expected),
        f"budget {sizes.budget}": arms.generating(sizes.budget, pool, expected=expected),
    }
    return _generating(runner, "whole GPU", sides, None)


def decode32k(runner: Runner) -> list[Row]:
    """Decoding at 32k, prompts already in, lowest keep ratio."""
    return _decoding(runner, [runner.sizes.keep[0]], GAIN)


def decode32k_more(runner: Runner) -> list[Row]:
    """The same at the other ratios."""
    return _decoding(runner, list(runner.sizes.keep[1:]), None)


def end_to_end(runner: Runner) -> list[Row]:
    """32k in, 512 out; no decode saving can give more than the ceiling."""
    sizes = runner.sizes
    setting = (
        f"{sizes.requests} requests, {sizes.context} in, {sizes.long_output} out, {_pool(sizes)}"
    )
    found, seconds = [], {}
    for name, keep in (("full KV", None), (f"keep {sizes.keep[0]}", sizes.keep[0])):
        measured = runner(name, runner.arms.whole_requests(keep))
        seconds[name] = measured["requests"]["repeats"]["seconds"][0]
        found.append(row(f"{setting}, {name}", "time for all", "s", [seconds[name]]))
        if keep is None:
            prompts = measured["prompts"]["repeats"]["seconds"][0]
            found.append(row(f"{setting}, {name}", "prompts alone", "s", [prompts]))
    full, compressed = seconds.values()
    found += [
        row(setting, "speed-up", "x", [full / compressed]),
        row(setting, "ceiling of the speed-up", "x", [full / prompts]),
    ]
    return found


def light(runner: Runner) -> list[Row]:
    """A few requests in an ample pool: stock twice, around compression on and opted out of."""
    sizes, arms = runner.sizes, runner.arms
    on = {"budget": sizes.budget}
    sides = {
        "stock": arms.lightly(None),
        "compression on": arms.lightly(on),
        "requests opt out": arms.lightly(on, off=True),
        "stock again": arms.lightly(None),
    }
    measured = {name: runner(name, arm) for name, arm in sides.items()}
    found = []
    for run in sides["stock"]["runs"]:
        first_token = run["max_tokens"] == 1
        metric = "time to first token" if first_token else "decode throughput"
        key, unit = ("prefill_seconds", "s") if first_token else ("decode_rate", "tokens/s")
        setting = f"light load, {run['name']}" + ("" if first_token else f", {run['length']} in")
        values = {name: m[run["name"]]["repeats"][key] for name, m in measured.items()}
        reference = statistics.median(values["stock"] + values["stock again"])
        for name, each in values.items():
            found.append(row(f"{setting}, {name}", metric, unit, each))
        for name in ("compression on", "requests opt out"):
            share = [100 * value / reference for value in values[name]]
            bar = {"most": 102.0} if first_token else {"least": 98.0}
            found.append(row(f"{setting}, {name}", f"{metric}, of stock's", "%", share, **bar))
    return found


def pruned32k(runner: Runner) -> list[Row]:
    """Time to first token of 32k prompts: stock vLLM, whole in one step, and pruned."""
    sizes, arms = runner.sizes, runner.arms
    setting = f"one prompt of {sizes.context} tokens"
    stock = runner("stock", arms.pruning(None))["1.0"]["repeats"]["prefill_seconds"]
    measured = runner("pruned", arms.pruning([1.0, *FRACTIONS]))
    found = [row(f"{setting}, stock", "time to first token", "s", stock)]
    for fraction in (1.0, *FRACTIONS):
        name = f"{setting}, " + ("whole" if fraction == 1 else f"{fraction} enter the last layers")
        seconds = measured[str(fraction)]["repeats"]["prefill_seconds"]
        found.append(row(name, "time to first token", "s", seconds))
        ratio = [statistics.median(stock) / one for one in seconds]
        bar = {"least": SOONER} if fraction == FRACTIONS[0] else {}
        found.append(row(name, "sooner than stock", "x", ratio, **bar))
        counters = measured[str(fraction)]["counters"]
        if counters["prefill_token_layers"]:
            read = counters["prefill_token_layers_read"] / counters["prefill_token_layers"]
            found.append(row(name, "tokens times layers read", "%", [100 * read]))
            chosen = counters["choose_seconds"] / counters["prompts_pruned"]
            found.append(row(name, "choosing tokens, a prompt", "s", [chosen]))
    return found


SCENARIOS: dict[str, Callable[[Runner], list[Row]]] = {
    "paper": paper,
    "paper-fp8": paper_fp8,
    "paper-whole": paper_whole,
    "decode32k": decode32k,
    "decode32k-more": decode32k_more,
    "end-to-end": end_to_end,
    "light": light,
    "pruned32k": pruned32k,
}


def _generating(
    runner: Runner, pool: str, sides: dict[str, dict[str, Any]], least: float | None
) -> list[Row]:
    """Each side's rates and how they compare with the first one's, which is full KV."""
    sizes = runner.sizes
    setting = f"{sizes.prompt} in, {sizes.output} out, {pool}"
    measured = {name: runner(name, arm)["steady"] for name, arm in sides.items()}
    found = [r for name, m in measured.items() for r in _steady_rows(f"{setting}, {name}", m)]
    (base, full), *others = measured.items()
    for name, m in others:
        ratio = _mean(m) / _mean(full)
        metric = f"tokens/s over {base}"
        found.append(row(f"{setting}, {name}", metric, "x", [ratio], least=least))
    return found


def _decoding(runner: Runner, keep: list[float], least: float | None) -> list[Row]:
    sizes = runner.sizes
    setting = f"decoding at {sizes.context}, {_pool(sizes)}"
    full = runner("full KV", runner.arms.decoding(None))["1.0"]
    found = _steady_rows(f"{setting}, full KV", full)
    compressed = runner(f"keep {keep}", runner.arms.decoding(keep))
    for ratio in keep:
        measured = compressed[str(ratio)]
        name = f"{setting}, keep {ratio}"
        found += _steady_rows(name, measured)
        gain = _mean(measured) / _mean(full)
        found.append(row(name, "tokens/s over full KV", "x", [gain], least=least))
    return found


def _steady_rows(setting: str, measured: dict[str, Any]) -> list[Row]:
    found = [
        row(setting, "generated, in a window of the steady state", "tokens/s", measured["rates"]),
        row(setting, "requests running", "", [measured["running"]]),
        row(setting, "preemptions", "", [measured["preemptions"]]),
        row(setting, "time until steady", "s", [measured["settle_seconds"]]),
    ]
    if not measured["steady"]:
        found.append(row(setting, "not steady when the window began", "", [1.0]))
    counters = measured["counters"]
    if counters:
        kept = counters["tokens_kept"] / max(counters["tokens_seen"], 1.0)
        found += [
            row(setting, "compactions", "", [counters["compactions"]], least=1.0),
            row(setting, "kept over seen tokens", "", [kept]),
        ]
    if measured.get("decode_steps"):
        share = measured["decode_executions"] / measured["decode_steps"]
        found.append(row(setting, "decode kernel, runs per planned step", "", [share]))
    if "decode_executions" in measured:
        # Counted on the device: replays of a captured graph, not captures.
        share = measured["decode_executions"] / max(measured["steps"], 1)
        found.append(row(setting, "decode kernel, runs per step", "", [share], least=0.9))
    return found


def _free_for_cache() -> int:
    """About what vLLM leaves for the cache: 0.9 of the GPU less weights and working memory."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    return int(0.9 * total) - (20 << 30)


def _mean(measured: dict[str, Any]) -> float:
    return statistics.fmean(measured["rates"])


def _pool(sizes: Sizes) -> str:
    if sizes.pool >> 30:
        return f"pool of {sizes.pool >> 30} GiB"
    return f"pool of {sizes.pool >> 10} KiB"
