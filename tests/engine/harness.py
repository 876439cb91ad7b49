"""A real engine for tests, in this process and stepped by hand.

Every request is queued before the first step, so the batches of a scenario are the same in every
run and on every engine, and the scheduler's state can be looked at. (The soak and the command
line's tests run the engine as in production: scheduler and worker in processes of their own.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

BLOCK = 32


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        name: unique in its scenario.
        prompt: token ids.
        tokens: length of the answer (the end-of-text token is ignored).
        extra: per-request settings (`kv_compress`, ...).
        samples: more than one: drawn at temperature 0.8; else greedy.
        abort_at: give up on it once it has this many tokens; 0: after the first step.
    """

    name: str
    prompt: tuple[int, ...]
    tokens: int = 12
    extra: dict[str, Any] = field(default_factory=dict)
    samples: int = 1
    abort_at: int | None = None


@dataclass
class Answer:
    """One sequence of one request.

    Attributes:
        request_id: the engine's own id, as in the trace.
        tokens: generated ids.
        logprobs: per token, id -> log-probability of the five best and the one chosen.
        greedy: whether the best token was asked for.
        facts: what the engine says was kept, if the request asked (`kv_report`).
    """

    request_id: str
    prompt: tuple[int, ...]
    tokens: list[int]
    logprobs: list[dict[int, float]]
    greedy: bool
    facts: dict[str, Any] | None = None


class Engine:
    """An ``LLM`` with the plugin (`settings` given) or without."""

    def __init__(
        self, model: Path, settings: dict[str, Any] | None = None, **arguments: Any
    ) -> None:
        from vllm import LLM

        given: dict[str, Any] = {
            "max_model_len": 2048,
            "enforce_eager": True,
            "block_size": BLOCK,
            "kv_cache_memory_bytes": 300_000_000,
            "max_num_seqs": 32,
            "max_num_batched_tokens": 256,
            "disable_log_stats": False,
            "seed": 0,
        }
        given |= arguments
        if settings is not None:
            given["additional_config"] = {"uncomp": settings}
        self.settings = settings
        self.llm = LLM(str(model), **given)
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.manager = self.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        #: blocks exchanged because another request held them
        self.exchanged = 0
        if settings is not None:
            self._count_exchanges(self.manager)

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def serve(
        self,
        asks: Sequence[Ask],
        at_once: int | None = None,
        observe: Callable[[], None] = lambda: None,
    ) -> dict[str, list[Answer]]:
        """Serve requests, all at once or `at_once` at a time; aborted ones have no answer.

        Args:
            observe: called after every step.
        """
        # Samples are drawn from the process's generator: a seed per request fails in vLLM's CPU
        # runner (a generator there cannot step back after a prefill chunk).
        torch.manual_seed(7)
        at_once = at_once or len(asks)
        answers: dict[str, list[Answer]] = {}
        for first in range(0, len(asks), at_once):
            answers |= self._serve(asks[first : first + at_once], observe)
        return answers

    def _serve(self, asks: Sequence[Ask], observe: Callable[[], None]) -> dict[str, list[Answer]]:
        engine = self.llm.llm_engine
        by_name = {ask.name: ask for ask in asks}
        ids = {}
        for ask in asks:
            prompt = {"prompt_token_ids": list(ask.prompt)}
            ids[ask.name] = engine.add_request(ask.name, prompt, _sampling(ask))
        answers: dict[str, list[Answer]] = {}
        hasty = [ask.name for ask in asks if ask.abort_at == 0]
        while engine.has_unfinished_requests():
            outputs = engine.step()
            observe()
            if hasty:
                engine.abort_request(hasty)
                hasty = []
            for output in outputs:
                ask = by_name[output.request_id]
                if ask.abort_at is None and output.finished:
                    answers[ask.name] = _answers(ask, output, ids[ask.name])
                elif ask.abort_at and len(output.outputs[0].token_ids) >= ask.abort_at:
                    engine.abort_request([ask.name])
        return answers

    def _count_exchanges(self, manager: Any) -> None:
        original = manager.make_private

        def make_private(
            request_id: str, first: int, last: int, fresh: bool = False
        ) -> tuple[int, ...] | None:
            before = [block.block_id for block in manager.req_to_blocks[request_id][first:last]]
            blocks = original(request_id, first, last, fresh)
            self.exchanged += sum(a != b for a, b in zip(before, blocks or before, strict=True))
            return blocks

        manager.make_private = make_private

    @contextmanager
    def pool_of(self, blocks: int) -> Iterator[None]:
        """Serve from a pool of `blocks` blocks: the others are taken out of it."""
        self.forget()
        taken = self.pool.get_new_blocks(self.pool.get_num_free_blocks() - blocks)
        try:
            yield
        finally:
            self.pool.free_blocks(taken)

    @contextmanager
    def chunks_of(self, tokens: int) -> Iterator[None]:
        """Schedule at most `tokens` tokens a step (at most what the engine was started with)."""
        before = self.scheduler.max_num_scheduled_tokens
        assert tokens <= before
        self.scheduler.max_num_scheduled_tokens = tokens
        try:
            yield
        finally:
            self.scheduler.max_num_scheduled_tokens = before

    def forget(self) -> None:
        """Empty the prefix cache."""
        assert self.llm.reset_prefix_cache()

    def metric(self, name: str) -> float:
        """Sum of a vLLM counter."""
        return sum(m.value for m in self.llm.get_metrics() if m.name == f"vllm:{name}")

    def report(self) -> dict[str, Any]:
        return self.llm.collective_rpc("uncomp_report")[0]

    def counters(self) -> dict[str, float]:
        from uncomp.engine.counters import open_counters

        [counters] = open_counters(self.llm.llm_engine.vllm_config.instance_id)
        return counters.snapshot()

    def trace(self, request_id: str | None = None) -> list[dict[str, Any]]:
        """Trace records (of one request) in the order written."""
        if self.settings is None:
            return []
        return self._read("kept-0.jsonl", request_id)

    def pruned(self, request_id: str) -> list[dict[str, Any]]:
        """What of its prompt went how far, in the order written."""
        return self._read("pruned-0.jsonl", request_id)

    def _read(self, name: str, request_id: str | None) -> list[dict[str, Any]]:
        assert self.settings is not None
        path = Path(self.settings["trace"], name)
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        return [r for r in records if request_id in (None, r["request_id"])]

    def leftovers(self) -> dict[str, Any]:
        """What is still held when all requests are done; empty if nothing is."""
        # A worker learns from the next step's message that a request has ended.
        self.serve([Ask("flush", (1,), tokens=1, extra={"kv_compress": False})])
        pool, manager = self.pool, self.manager
        found: dict[str, Any] = {
            "blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            "references": sum(b.ref_cnt for b in pool.blocks if not b.is_null),
            "rows": dict(manager.req_to_blocks),
            "requests": dict(self.scheduler.requests),
        }
        if self.settings is not None:
            counters, report = self.counters(), self.report()
            found |= {
                "compacted": manager.compacted,
                "tracked": self.scheduler._planner.tracked,
                "worker tables": report["compressed_requests"],
                "worker queries": report["recorded_requests"],
                "blocks held": counters["blocks_held"],
                "orders not run": counters["orders_sent"] - report["orders_run"],
                "orders not counted": counters["orders_sent"] - counters["compactions"],
            }
        return {name: value for name, value in found.items() if value}


@contextmanager
def running(
    model: Path, settings: dict[str, Any] | None = None, **arguments: Any
) -> Iterator[Engine]:
    """An engine, shut down at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        engine = Engine(model, settings, **arguments)
        try:
            yield engine
        finally:
            engine.close()


def _sampling(ask: Ask) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0 if ask.samples == 1 else 0.8,
        n=ask.samples,
        max_tokens=ask.tokens,
        ignore_eos=True,
        logprobs=5,
        detokenize=False,
        extra_args=dict(ask.extra) or None,
    )


def _answers(ask: Ask, output: Any, request_id: str) -> list[Answer]:
    answers = []
    for sample in sorted(output.outputs, key=lambda o: o.index):
        own_id = request_id if ask.samples == 1 else f"{sample.index}_{request_id}"
        logprobs = [{t: e.logprob for t, e in step.items()} for step in sample.logprobs]
        facts = (output.kv_transfer_params or {}).get("uncomp")
        answers.append(
            Answer(own_id, ask.prompt, list(sample.token_ids), logprobs, ask.samples == 1, facts)
        )
    return answers
