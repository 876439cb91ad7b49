"""vLLM's real schedulers and uncomp's real planner, block manager, worker and compactor, driven
without an engine: the model is :mod:`fake_runner`, and outputs come back as late as wanted.

``Simulation.step`` follows ``EngineCore.step_with_batch_queue``: with a lag of 0 a step is executed
and its output processed before the next one is scheduled (synchronous); with a lag of n, up to n
more steps are scheduled first (asynchronous scheduling on GPUs: 1).
"""

from __future__ import annotations

import pickle
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from fake_runner import FakeRunner, RandomPolicy, Shape, token_gaps
from vllm.config import CacheConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_block_hash, get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from uncomp.engine.by_config import ByConfig
from uncomp.engine.cache_manager import CompressedManager, CompressedSpec
from uncomp.engine.compactor import Compactor, LayerCache
from uncomp.engine.cpu_layout import CacheLayout, HalfLayout
from uncomp.engine.orders import ATTRIBUTE
from uncomp.engine.planner import CompactionPlanner
from uncomp.engine.scheduler import CompactingAsyncScheduler, CompactingScheduler
from uncomp.engine.seat import QueryRing, Seat
from uncomp.engine.settings import make_policy
from uncomp.engine.state import CompressedRequests
from uncomp.engine.worker import CompactingCPUWorker

Hook = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One simulated server."""

    settings: dict[str, Any]
    shape: Shape
    asynchronous: bool = False
    lag: int = 0
    max_model_len: int = 96
    max_num_batched_tokens: int = 32
    max_num_seqs: int = 6
    vocabulary: int = 12
    stop: bool = True  # token 0 ends a request, which the scheduler learns late
    prefix_caching: bool = True
    wide_rows: bool = False  # compressed rows of several tokens, as on CPUs
    apart: bool = False  # later compactions write to other blocks, as on GPUs where layers share
    seed: int = 0


@dataclass
class Step:
    """A scheduled step on its way: what the worker gets, the hashed blocks once it has run, and
    its output after that."""

    output: Any
    sent: bytes
    hashed: dict[int, bytes]
    result: bytes | None = None


class Simulation:
    """A scheduler and a worker with everything between them, checked after every move."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.random = random.Random(setup.seed)
        config = _vllm_config(setup)
        self.scheduler = _scheduler(setup, config)
        self.planner: CompactionPlanner = self.scheduler._planner
        self.planner.wide_rows = setup.wide_rows
        self.planner.apart = setup.apart
        self.planner.gaps = token_gaps
        self.manager: CompressedManager = self.scheduler._manager
        self.pool = self.manager.block_pool
        self.config = self.planner.config
        self.runner = FakeRunner(setup.shape, self.config, setup.vocabulary, self.random)
        self.worker = _worker(setup, self.config, self.runner)
        self.seat: Seat = self.worker._seat
        self.in_flight: deque[Step] = deque()
        self.requests: dict[str, Request] = {}
        #: how often things happened, to know that the traffic tests something
        self.happened: Counter[str] = Counter()
        self._freed: set[int] = set()
        self.finished: set[str] = set()
        self._hasher = get_request_block_hasher(setup.shape.block_size, sha256)
        self._content_of_hash: dict[bytes, list[int]] = {}
        self._watch()

    # -- the client's side

    def add(self, request_id: str, prompt: list[int], max_tokens: int, **extra: Any) -> None:
        params = SamplingParams(
            max_tokens=max_tokens,
            stop_token_ids=[0] if self.setup.stop else [],
            extra_args=extra or None,
        )
        request = Request(request_id, prompt, params, None, block_hasher=self._hasher)
        self.requests[request_id] = request
        self.finished.discard(request_id)
        self.scheduler.add_request(request)

    def abort(self, request_id: str) -> None:
        self.happened["aborted"] += 1
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        self._forget_finished()
        self.check()

    # -- the engine's side

    def step(self, hook: Hook = lambda moment: None) -> None:
        """One turn of the engine's loop; ``hook`` may act as a client in between."""
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self.in_flight.append(Step(output, pickle.dumps(output), self._hashed_blocks()))
            self._note(output)
            self.check()
            hook("scheduled")
            if self.random.random() < 0.5:
                self._execute()
                hook("executed")
            ran = output.total_num_scheduled_tokens > 0
            if len(self.in_flight) <= self.setup.lag and (ran or self.scheduler.has_requests()):
                return
        if not self.in_flight:
            return
        self._execute(1)
        hook("finished")
        step = self.in_flight.popleft()
        assert step.result is not None
        self.scheduler.update_from_output(step.output, pickle.loads(step.result))
        self._forget_finished()
        self.check()

    def drain(self, limit: int = 2000) -> None:
        """Run until everything has finished, then check that nothing is left anywhere."""
        for _ in range(limit):
            if not self.in_flight and not self.scheduler.has_requests():
                break
            self.step()
        else:
            raise AssertionError(f"not finished after {limit} steps: {self.scheduler.requests}")
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1
        assert not self.manager.compacted
        assert not any(self.manager.req_to_blocks.values())
        assert not self.manager.num_cached_block
        assert not self.planner.tracked
        assert not self.seat.requests.slots
        assert self.seat.ring is None or len(self.seat.ring) == 0
        assert not self.runner.residents
        self.scheduler.shutdown()

    # -- inside

    def _execute(self, most: int | None = None) -> None:
        """Let the worker run the next ``most`` steps that wait for it (all: ``None``)."""
        for step in [s for s in self.in_flight if s.result is None][:most]:
            if most is not None and self.in_flight[0].result is not None:
                return
            sent = pickle.loads(step.sent)
            result = self.worker.execute_model(sent)
            if result is None:
                result = self.worker.sample_tokens(None)
            step.result = pickle.dumps(result)
            plan = getattr(sent, ATTRIBUTE)
            self.runner.check_orders(plan)
            self._check_worker(sent)
            self._check_hashed(step.hashed)

    def _check_worker(self, sent: Any) -> None:
        """Planner and worker agree about every request of the step, and nothing lingers."""
        plan = getattr(sent, ATTRIBUTE)
        wanted = {i: plan.generations.get(i, 0) for i in sent.num_scheduled_tokens}
        wanted |= {order.request_id: order.generation for order in plan.orders}
        slots = self.seat.requests.slots
        for request_id, generation in wanted.items():
            have = slots[request_id].generation if request_id in slots else 0
            assert have == generation, request_id
        assert set(slots) <= set(self.runner.residents)
        gone = set(sent.finished_req_ids) | set(sent.preempted_req_ids or ())
        assert not set(slots) & (gone - set(sent.num_scheduled_tokens)), "stale compressed request"

    def _hashed_blocks(self) -> dict[int, bytes]:
        assert not self.pool.cached_block_hashes_by_block
        self._learn_hashes()
        return {
            block.block_id: get_block_hash(block.block_hash)
            for block in self.pool.blocks
            if block.block_hash is not None
        }

    def _learn_hashes(self) -> None:
        """Which content a block hash stands for, for every hash any request has."""
        size = self.setup.shape.block_size
        for request in self.requests.values():
            last = request.block_hashes[-1] if request.block_hashes else None
            if last is None or last in self._content_of_hash:
                continue
            content = self.runner.prefixes.of(list(request.all_token_ids))
            for i, block_hash in enumerate(request.block_hashes):
                self._content_of_hash[block_hash] = content[i * size : (i + 1) * size]

    def _check_hashed(self, hashed: dict[int, bytes]) -> None:
        """A prefix-cache hit finds the keys and values of exactly that prefix."""
        if not hashed:
            return
        content = torch.tensor([self._content_of_hash[h] for h in hashed.values()])
        shape = self.setup.shape
        wanted = self.runner.tags(content.flatten())
        wanted = wanted.unflatten(0, (len(hashed), shape.block_size))
        for layer, halves in enumerate(self.runner.halves):
            got = halves[torch.tensor(list(hashed)), :, 0].transpose(1, 2)
            wrong = (got != wanted[:, :, layer]).flatten(1).any(1)
            blocks = [b for b, bad in zip(hashed, wrong.tolist(), strict=True) if bad]
            assert not blocks, f"blocks {blocks} are in the prefix cache with other content"

    def check(self) -> None:
        """Block accounting as the scheduler sees it."""
        owners: dict[int, list[str]] = {}
        for request_id, row in self.manager.req_to_blocks.items():
            for block in row:
                if not block.is_null:
                    owners.setdefault(block.block_id, []).append(request_id)
        free = {block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()}
        for block in self.pool.blocks:
            if block.is_null:
                continue
            count = len(owners.get(block.block_id, ()))
            assert block.ref_cnt == count, f"block {block.block_id}: {block.ref_cnt} for {count}"
            assert (block.block_id in free) == (count == 0)
        running = {request.request_id for request in self.scheduler.running}
        assert set(self.manager.compacted) <= running
        live = set(self.scheduler.requests) | self.scheduler.finished_req_ids
        assert set(self.planner.tracked) <= live
        for request_id, first in self.manager.compacted.items():
            row = self.manager.req_to_blocks[request_id]
            for block in row[first:]:
                assert not block.is_null
                assert block.block_hash is None, "a compacted block is in the prefix cache"
                assert owners[block.block_id] == [request_id], "a compacted block is shared"
            order = self.planner.tracked[request_id].pending
            if order is None:
                assert all(block.is_null for block in row[:first])
            elif order.first_kept:
                assert not row[order.first_kept - 1].is_null, "given back before the order ran"

    def _watch(self) -> None:
        """Follow blocks that the planner exchanges and gives back."""
        release, make_private = self.manager.release_prefix, self.manager.make_private

        def released(request_id: str, last: int) -> int:
            row = self.manager.req_to_blocks[request_id][:last]
            before = {block.block_id for block in row if not block.is_null}
            assert release(request_id, last) == len(before)
            self._freed |= before
            self.happened["freed"] += len(before)
            return len(before)

        def made_private(
            request_id: str, first: int, last: int, fresh: bool = False
        ) -> tuple[int, ...] | None:
            before = [b.block_id for b in self.manager.req_to_blocks[request_id][first:last]]
            blocks = make_private(request_id, first, last, fresh)
            assert not fresh or not set(before) & set(blocks or ()), "blocks are not fresh"
            self.happened["apart"] += fresh and blocks is not None
            self.happened["postponed" if blocks is None else "ordered"] += 1
            changed = [a != b for a, b in zip(before, blocks or before, strict=True)]
            self.happened["exchanged"] += sum(changed)
            return blocks

        self.manager.release_prefix = released  # type: ignore[method-assign]
        self.manager.make_private = made_private  # type: ignore[method-assign]

    def _note(self, output: Any) -> None:
        cached, new = output.scheduled_cached_reqs, output.scheduled_new_reqs
        given = [request.block_ids for request in new] + list(cached.new_block_ids)
        ids = {block for blocks in given if blocks is not None for block in blocks[0]}
        self.happened["reused"] += len(ids & self._freed)
        self._freed -= ids
        self.happened["hits"] += sum(request.num_computed_tokens > 0 for request in new)
        self.happened["preempted"] += len(output.preempted_req_ids or ())
        self.happened["resumed"] += len(cached.resumed_req_ids)

    def _forget_finished(self) -> None:
        self._learn_hashes()
        for request_id in [i for i, r in self.requests.items() if r.is_finished()]:
            del self.requests[request_id]
            self.finished.add(request_id)


def _vllm_config(setup: Setup) -> Any:
    """A configuration with all that the scheduler reads; no model behind it."""
    config = VllmConfig(
        scheduler_config=SchedulerConfig(
            max_model_len=setup.max_model_len,
            is_encoder_decoder=False,
            max_num_batched_tokens=setup.max_num_batched_tokens,
            max_num_seqs=setup.max_num_seqs,
        ),
        cache_config=CacheConfig(
            block_size=setup.shape.block_size, enable_prefix_caching=setup.prefix_caching
        ),
        additional_config={"uncomp": setup.settings},
        instance_id="simulated",
    )
    config.cache_config.num_gpu_blocks = setup.shape.blocks
    # The CPU platform always switches it off.
    config.scheduler_config.async_scheduling = setup.asynchronous
    config.model_config = SimpleNamespace(  # type: ignore[assignment]
        max_model_len=setup.max_model_len,
        uses_mrope=False,
        is_encoder_decoder=False,
        multimodal_config=None,
        use_mla=False,
        is_diffusion=False,
        runner_type="generate",
        skip_tokenizer_init=True,  # the tests give the planner a vocabulary
        supports_multimodal_inputs=False,
        return_sampling_mask=False,
        hf_text_config=SimpleNamespace(num_hidden_layers=setup.shape.layers),
    )
    return config


def _scheduler(setup: Setup, config: Any) -> Scheduler:
    init_none_hash(sha256)
    shape, uncomp = setup.shape, config.additional_config["uncomp"]
    policy = make_policy(_settings(uncomp))
    plain = FullAttentionSpec(
        block_size=shape.block_size,
        num_kv_heads=shape.heads,
        head_size=1,
        dtype=torch.float64,
    )
    window = _settings(uncomp).window if policy.needs_queries else 0
    names = [f"layer.{i}" for i in range(shape.layers)]
    group = KVCacheGroupSpec(names, CompressedSpec.of(plain, window))
    kind = CompactingAsyncScheduler if setup.asynchronous else CompactingScheduler
    return kind(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(shape.blocks, [], [group]),
        structured_output_manager=SimpleNamespace(accept_tokens=lambda *args: True),
        block_size=shape.block_size,
        log_stats=True,
    )


def _settings(given: dict[str, Any]) -> Any:
    from uncomp.config import UncompConfig

    return UncompConfig.from_mapping(given)


def _worker(setup: Setup, config: Any, runner: FakeRunner) -> CompactingCPUWorker:
    """uncomp's worker with a seat, without vLLM's own start-up."""
    shape = setup.shape
    queries = make_policy(config).needs_queries
    half = HalfLayout.of(torch.arange(shape.block_size).unsqueeze(1))
    requests = CompressedRequests(shape.layers, shape.heads, shape.block_size)

    def compactor(config: Any) -> Compactor:
        return Compactor(
            config,
            RandomPolicy(make_policy(config).needs_queries, setup.seed),
            [LayerCache(i, cache, 1.0, 0.0) for i, cache in enumerate(runner.caches)],
            CacheLayout(half, half),
            requests,
        )

    ring = None
    if queries:
        heads = (shape.heads * shape.group, 1)
        ring = QueryRing(shape.layers, config.window, heads, torch.float64)
    worker = object.__new__(CompactingCPUWorker)
    worker.model_runner = runner  # type: ignore[assignment]
    parallel = SimpleNamespace(distributed_executor_backend="uni")
    worker.vllm_config = SimpleNamespace(parallel_config=parallel)  # type: ignore[assignment]
    worker._receipts = []
    worker._seat = Seat(
        requests, ring, ByConfig(compactor(config), compactor), worker._row_ids, worker._host_row
    )
    runner.seat = worker._seat
    return worker
