"""Child of `gpu_engine`: one engine with dummy weights, and the load put on it."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

from uncomp.eval.bench import traffic
from uncomp.eval.bench.engines import MARK, counter_difference, preemptions

#: slices of a measured window
SLICES = 10
#: steps without a new running request after which a state is steady
STEADY_STEPS = 48


def child(arm: dict[str, Any]) -> dict[str, Any]:
    """Start the engine and run ``arm["runs"]`` one after the other; see `gpu_scenarios`."""
    from vllm import LLM

    from uncomp.engine.counters import open_counters

    start = time.perf_counter()
    llm = LLM(model=arm["model"], disable_log_stats=False, **arm["engine"])
    engine = llm.llm_engine
    config = engine.vllm_config
    result: dict[str, Any] = {
        "start_seconds": time.perf_counter() - start,
        "blocks": config.cache_config.num_gpu_blocks,
        "graphs": str(config.compilation_config.cudagraph_mode),
        "async": bool(config.scheduler_config.async_scheduling),
    }
    vocabulary = config.model_config.get_vocab_size()
    traffic.run(engine, "warm", [tokens(vocabulary, 64, i) for i in range(2)], 8, salt="warm")
    compressing = bool(arm["engine"].get("additional_config"))
    for run in arm["runs"]:
        before = [c.snapshot() for c in open_counters(config.instance_id)]
        lost = preemptions(llm)
        steps = _executions(llm) if compressing else None
        carry_out = steady if run["kind"] == "steady" else batch
        found = carry_out(engine, run, vocabulary)
        after = [c.snapshot() for c in open_counters(config.instance_id)]
        found["counters"] = counter_difference(before, after)
        found["preemptions"] = preemptions(llm) - lost
        now = _executions(llm) if compressing else None
        if steps is not None and now is not None:
            found["decode_steps"] = now[0] - steps[0]
            found["decode_executions"] = now[1] - steps[1]
        result[run["name"]] = found
    return result


def tokens(vocabulary: int, length: int, seed: int) -> list[int]:
    """A prompt of random tokens, the same for the same seed."""
    draw = random.Random(seed)
    return draw.choices(range(2, vocabulary), k=length)


def batch(engine: Any, run: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Requests sent at once, until they are done; prompts are new in every repetition."""
    repeats: dict[str, list[float]] = {"prefill_seconds": [], "decode_rate": [], "seconds": []}
    for i in range(run["repeat"]):
        seed = hash_of(run["name"]) + 1000 * i
        prompts = [tokens(vocabulary, run["length"], seed + n) for n in range(run["count"])]
        timed = traffic.run(
            engine, f"{run['name']}-{i}", prompts, run["max_tokens"], run.get("extra_args")
        )
        repeats["prefill_seconds"].append(timed.prefill_seconds or timed.total_seconds)
        repeats["decode_rate"].append(timed.decode_rate)
        repeats["seconds"].append(timed.total_seconds)
    return {"repeats": repeats}


def steady(engine: Any, run: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Load above capacity: generated tokens per second in a window of a steady state.

    ``started`` requests are put at every point of their output (see `Arms.generating`), further
    ones always wait. The window begins when no more get in; its end aborts what still runs.
    """
    load = _Load(engine, run, vocabulary)
    load.top_up()
    began = time.perf_counter()
    most = quiet = 0
    while quiet < STEADY_STEPS and time.perf_counter() - began < run["settle"]:
        running, _ = load.step()
        quiet = 0 if running > most else quiet + 1
        # An engine that only computes prompts gives no tokens: that is not yet steady.
        quiet = quiet if running else 0
        most = max(most, running)
    settled = time.perf_counter() - began
    rates, batches = [], []
    for _ in range(SLICES):
        start, generated = time.perf_counter(), 0
        while time.perf_counter() - start < run["window"] / SLICES:
            running, fresh = load.step()
            generated += fresh
            batches.append(running)
        rates.append(generated / (time.perf_counter() - start))
    load.end()
    return {
        "rates": rates,
        "running": sum(batches) / len(batches),
        "settle_seconds": settled,
        "steady": quiet >= STEADY_STEPS,
        "steps": len(batches),
    }


class _Load:
    """Keeps requests waiting."""

    def __init__(self, engine: Any, run: dict[str, Any], vocabulary: int) -> None:
        self.engine, self.run = engine, run
        self._requests = self._endless(run, vocabulary)
        self._open: set[str] = set()
        self._target = run["started"] + run["waiting"]

    def top_up(self) -> None:
        """As many requests in the engine as at the beginning."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        while len(self._open) < self._target:
            name, prompt, output = next(self._requests)
            params = SamplingParams(
                temperature=0,
                max_tokens=output,
                ignore_eos=True,
                detokenize=False,
                # The default repeats the whole answer at every step.
                output_kind=RequestOutputKind.DELTA,
                extra_args=self.run.get("extra_args"),
            )
            self.engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)
            self._open.add(name)

    def step(self) -> tuple[int, int]:
        """(requests that got tokens, tokens)."""
        running = fresh = 0
        for output in self.engine.step():
            got = len(output.outputs[0].token_ids)
            running += got > 0
            fresh += got
            if output.finished:
                self._open.discard(output.request_id)
        self.top_up()
        return running, fresh

    def end(self) -> None:
        """Abort everything. No further step: an engine without requests never ends one."""
        self.engine.abort_request(list(self._open))

    @staticmethod
    def _endless(run: dict[str, Any], vocabulary: int) -> Iterator[tuple[str, list[int], int]]:
        number, seed = 0, hash_of(run["name"])
        while True:
            prompt, output = run["prompt"], run["output"]
            if number < run["started"]:
                # Multiples of the golden ratio: evenly spread however many get in at first.
                written = int(number * 0.6180339887 % 1.0 * (output - 1))
                output -= written
                prompt += written if run["written"] == "prompt" else 0
            same = run.get("same_prompt")
            made = tokens(vocabulary, prompt, seed if same else seed + number)
            yield f"{run['name']}-{number}", made, output
            number += 1


def hash_of(text: str) -> int:
    """The same in every process."""
    return sum(ord(letter) * 131**i for i, letter in enumerate(text)) % 2**31


def _executions(llm: Any) -> tuple[int, int] | None:
    """Steps planned for the decode kernel, and runs of it counted on the device (least layer)."""
    report = llm.collective_rpc("uncomp_report")[0]
    if not report.get("decode_executions"):
        return None  # no GPU
    return report["decode_steps"], min(report["decode_executions"])


if __name__ == "__main__":
    print(MARK + json.dumps(child(json.loads(sys.argv[1]))), flush=True)
