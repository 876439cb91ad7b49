"""One engine run for `uncomp doctor`, in a process of its own so that each run starts clean.

python -m uncomp.engine.probe TASK RESULT      # both JSON files
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import uuid
from importlib.resources import files
from pathlib import Path
from typing import Any


def prompt_tokens(config: Any, max_model_len: int, generated: int) -> int:
    """Length of the probe prompt: long enough that the settings should give blocks back."""
    enough = max(1500, 2 * config.min_tokens, 3 * (config.budget or 0))
    if config.prefill_keep is not None:
        enough = max(enough, 2 * config.prefill_floor)
    return min(enough, max_model_len - generated - 1)


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Start an engine, serve the probe requests one by one, and say what was seen.

    Args:
        task: ``arguments`` for vLLM's engine (command line), ``tokens`` of the prompt (0: choose),
            ``generate`` tokens per request, and ``extra``: the settings of each request.
    """
    from vllm import LLM, EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from uncomp.engine.calibrated import schedule_of
    from uncomp.engine.settings import requested

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="uncomp doctor"))
    engine_args = EngineArgs.from_cli_args(parser.parse_args(task["arguments"]))
    given = {f.name: getattr(engine_args, f.name) for f in dataclasses.fields(engine_args)}
    llm = LLM(**given)
    vllm_config = llm.llm_engine.vllm_config
    config = requested(vllm_config)
    length = task["tokens"]
    if not length:
        assert config is not None
        length = prompt_tokens(config, vllm_config.model_config.max_model_len, task["generate"])
    result = facts(vllm_config)
    schedule = schedule_of(config, vllm_config.model_config.hf_text_config) if config else None
    if schedule is not None:
        result["stages"] = {"starts": schedule.starts, "layers": schedule.layers}
    before = counters(vllm_config)
    result["requests"] = []
    for extra in task["extra"]:
        answer = ask(llm, length, task["generate"], extra)
        after = counters(vllm_config)
        answer["counted"] = {k: v - before.get(k, 0.0) for k, v in after.items()}
        before = after
        result["requests"].append(answer)
    result["tokens"] = length
    result["counters"] = before
    if config is not None:
        result["workers"] = llm.collective_rpc("uncomp_report")
    return result


def facts(vllm_config: Any) -> dict[str, Any]:
    """What this process knows of itself and of the configuration."""
    import vllm

    from uncomp.engine.conflicts import CONFLICTS
    from uncomp.patches.apply import PATCHES

    scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
    return {
        "pid": os.getpid(),
        "vllm": vllm.__version__,
        "patches": {patch.name: (patch.target, patch.applied()) for patch in PATCHES},
        "conflicts": [(c.feature, c.why, c.remedy) for c in CONFLICTS],
        "block_size": vllm_config.cache_config.block_size,
        "model": vllm_config.model_config.model,
        "dtype": str(vllm_config.model_config.dtype).removeprefix("torch."),
        "features": {
            "prefix caching": bool(vllm_config.cache_config.enable_prefix_caching),
            "chunked prefill": bool(scheduler.enable_chunked_prefill),
            "async scheduling": bool(scheduler.async_scheduling),
            "compiled model": not vllm_config.model_config.enforce_eager,
            "tensor parallel": parallel.tensor_parallel_size > 1,
            "data parallel": parallel.data_parallel_size > 1,
        },
    }


def ask(llm: Any, length: int, generate: int, extra: dict[str, Any]) -> dict[str, Any]:
    """One greedy request; tokens and the log-probabilities of the best two at each step."""
    from vllm import SamplingParams, TokensPrompt

    text = (files("uncomp.data") / "moby_dick.txt").read_text(encoding="utf-8")
    ids = llm.get_tokenizer().encode(text[: 12 * length])[:length]
    params = SamplingParams(
        temperature=0, max_tokens=generate, ignore_eos=True, logprobs=2, extra_args=extra
    )
    # A salt of its own: no request finds the blocks of the one before it in the prefix cache.
    prompt = TokensPrompt(prompt_token_ids=ids, cache_salt=uuid.uuid4().hex)
    output = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    best = [{token: p.logprob for token, p in step.items()} for step in output.logprobs]
    return {"tokens": list(output.token_ids), "logprobs": best}


def counters(vllm_config: Any) -> dict[str, float]:
    """Counters of the engine's first data-parallel rank; empty without the plugin."""
    from uncomp.engine.counters import open_counters

    found = open_counters(vllm_config.instance_id)
    return found[0].snapshot() if found else {}


def main(argv: list[str]) -> int:
    """Run a task; the result file holds ``{"error": ...}`` if the engine does not start."""
    task, result = (Path(argument) for argument in argv)
    try:
        seen = run(json.loads(task.read_text(encoding="utf-8")))
    except Exception as error:
        seen = {"error": f"{type(error).__name__}: {error}"}
    result.write_text(json.dumps(seen), encoding="utf-8")
    return int("error" in seen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
