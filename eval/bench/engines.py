"""One benchmark arm: a fresh process with one engine, described by JSON on the command line.

A process of its own, because vLLM reads environment variables at import, spawns workers, and
returns its memory only when it ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

MARK = "UNCOMP-BENCH "


def run_arm(
    arm: dict[str, Any], module: str = "uncomp.eval.bench.engines", timeout: float | None = None
) -> dict[str, Any]:
    """Run an arm in a child process.

    Args:
        arm: ``model``, ``engine`` (arguments of ``LLM``), ``env``, ``runs`` (see ``_child``).
        module: what the child runs.
        timeout: seconds; then the child and its workers are ended.

    Returns:
        What the child measured, by run name.

    Raises:
        RuntimeError: the child failed or took too long; its last lines are in the message.
    """
    env = {**os.environ, "PYTHONSAFEPATH": "1", **arm.get("env", {})}
    command = [sys.executable, "-m", module, json.dumps(arm)]
    done = _run(command, env, timeout)
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode != 0 or not found:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise RuntimeError(f"benchmark arm failed (exit {done.returncode}):\n{tail}")
    return json.loads(found[-1].removeprefix(MARK))


def _run(
    command: list[str], env: dict[str, str], timeout: float | None
) -> subprocess.CompletedProcess[str]:
    # A session of its own: its workers end with it.
    child = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    late = ""
    try:
        out, err = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        late = f"\nended after {timeout:g} s"
        os.killpg(child.pid, signal.SIGKILL)
        out, err = child.communicate()
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        raise
    code = 1 if late else child.returncode
    return subprocess.CompletedProcess(command, code, out, err + late)


def _child(arm: dict[str, Any]) -> dict[str, Any]:
    """Start the engine and run ``arm["runs"]`` one after the other.

    A run: ``name``, ``count``, ``length`` (prompt tokens), ``max_tokens``, ``extra_args``,
    ``repeat``. Counters are the difference over the run.
    """
    from vllm import LLM

    from uncomp.engine.counters import open_counters
    from uncomp.eval.bench import traffic

    start = time.perf_counter()
    llm = LLM(model=arm["model"], disable_log_stats=False, **arm["engine"])
    engine = llm.llm_engine
    result: dict[str, Any] = {"start_seconds": time.perf_counter() - start}
    result["blocks"] = engine.vllm_config.cache_config.num_gpu_blocks
    tokenizer = llm.get_tokenizer()
    warm = traffic.prompts(tokenizer, 2, 64, seed=7)
    traffic.run(engine, "warm", warm, 8, salt="warm")
    for run in arm["runs"]:
        tokens = traffic.prompts(tokenizer, run["count"], run["length"])
        repeats = []
        for i in range(run.get("repeat", 1)):
            before = [c.snapshot() for c in open_counters(engine.vllm_config.instance_id)]
            preempted = preemptions(llm)
            timed = traffic.run(
                engine,
                f"{run['name']}-{i}",
                tokens,
                run["max_tokens"],
                run.get("extra_args"),
                salt=run.get("salt"),
            )
            after = [c.snapshot() for c in open_counters(engine.vllm_config.instance_id)]
            repeats.append(
                {
                    "prefill_seconds": timed.prefill_seconds,
                    "decode_rate": timed.decode_rate,
                    "decode_tokens": timed.decode_tokens,
                    "total_seconds": timed.total_seconds,
                    "preemptions": preemptions(llm) - preempted,
                    "counters": counter_difference(before, after),
                }
            )
        result[run["name"]] = repeats
    return result


def counter_difference(before: list[Any], after: list[Any]) -> dict[str, float]:
    """What an engine counted between two snapshots; maxima are those since it started."""
    if not after:
        return {}
    maxima = {name: after[0][name] for name in after[0] if name.endswith("_max")}
    changes = {n: after[0][n] - before[0][n] for n in after[0] if n not in maxima}
    return {**changes, **maxima, "block_bytes": after[0]["block_bytes"]}


def preemptions(llm: Any) -> float:
    """Requests that vLLM has preempted so far."""
    found = [m for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    return sum(metric.value for metric in found)


if __name__ == "__main__":
    print(MARK + json.dumps(_child(json.loads(sys.argv[1]))), flush=True)
