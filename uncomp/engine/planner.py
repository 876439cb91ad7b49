"""Scheduler side: which request is compacted when, to which blocks, and when blocks go back.

The planner owns no blocks and moves no data. It reads vLLM's request and block state after each
``schedule()``, sends orders with the step, and releases the prefix of a request's row once the
worker has confirmed the order, before the next ``schedule()``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from uncomp.config import UncompConfig
from uncomp.engine.cache_manager import CompressedManager, HashesBelow, Unshared
from uncomp.engine.counters import Counters
from uncomp.engine.orders import Order, Pruning, PruningReceipt, Receipt, StepPlan
from uncomp.engine.report import Report
from uncomp.plan import Target
from uncomp.pruning import WIDEST, Schedule, always_read
from uncomp.request import RequestError, request_settings
from uncomp.request_policy import needs_queries, needs_words

logger = logging.getLogger("vllm.uncomp")

NO_TOKENIZER = (
    "pooling_kind='word' needs to know what tokens say, and this engine runs without a "
    "tokenizer (skip_tokenizer_init): set pooling_kind to 'ema' and pooling to tokens, e.g. 16"
)


@dataclass
class Tracked:
    """What the planner knows of one scheduled request.

    Attributes:
        target: its budget.
        window: queries to remember before a compaction.
        trigger: computed tokens at which it is compacted next; ``None`` = never.
        generation: compactions ordered since it was (re)scheduled.
        full_blocks, kept: of the last compaction.
        pending: an order whose receipt has not come yet.
        report: what was kept so far.
    """

    target: Target
    trigger: int | None
    window: int = 0
    generation: int = 0
    full_blocks: int = 0
    kept: int = 0
    pending: Order | None = None
    report: Report = field(default_factory=Report)


class CompactionPlanner:
    """One per scheduler.

    Args:
        config: the server's settings.
        manager: block manager of the only KV-cache group.
        max_model_len: longest sequence the engine accepts.
        counters: where to count.
        schedule: where prompt tokens leave; ``None``: prompts are not pruned.
        wide_rows: the worker attends to compressed rows of several tokens.
        apart: compactions after the first of a request write to blocks that hold nothing of it.
        gaps: what every token begins (`uncomp.spans.Vocabulary.gaps`); ``None``: it is not known
            what the tokens say.
    """

    def __init__(
        self,
        config: UncompConfig,
        manager: CompressedManager,
        max_model_len: int,
        counters: Counters,
        schedule: Schedule | None = None,
        wide_rows: bool = False,
        apart: bool = False,
        gaps: Callable[[Sequence[int]], Any] | None = None,
    ) -> None:
        self.config = config
        self.manager = manager
        self.block_size = manager.block_size
        self.max_model_len = max_model_len
        self.counters = counters
        self.schedule = schedule
        self.wide_rows = wide_rows
        self.apart = apart
        self.gaps = gaps
        self.tracked: dict[str, Tracked] = {}

    def admit(self, request: Any) -> None:
        """Note whether a new request is pruned, or compacted in the middle of its prompt."""
        params = request.sampling_params
        given = getattr(params, "extra_args", None) or {}
        is_plain = "kv_compact_at" not in given and self.schedule is None
        if params is None or is_plain or getattr(request, "resumable", False):
            return
        try:
            target = self._target_of(request)
        except RequestError:
            return  # counted and logged when it is scheduled
        if target.place is not None:
            request.block_hashes = HashesBelow(request.block_hashes, target.place)
        elif self._stages(target, request.num_tokens)[-1] < request.num_tokens:
            if params.prompt_logprobs is not None:  # they need every token
                self.counters.refused("prompt_logprobs")
                return
            request.block_hashes = Unshared(request.block_hashes)

    def chunk(self, request: Any, start: int, wanted: int) -> int:
        """Tokens of a request that may be computed in one step.

        Args:
            start: tokens computed before.
            wanted: at least 0.

        Returns:
            0: the request has to wait for a step with more room.
        """
        if isinstance(request.block_hashes, Unshared):
            return wanted if start or wanted >= request.num_tokens else 0
        place = getattr(request.block_hashes, "limit", None)
        if place is None:
            return wanted
        # The end of a chunk is where a compaction can be.
        if start < place:
            return min(wanted, place - start)
        if not self.wide_rows:
            return min(wanted, 1)
        tracked = self.tracked.get(request.request_id)
        trigger = tracked.trigger if tracked is not None else None
        return wanted if trigger is None else min(wanted, max(1, trigger - start))

    def plan(self, output: Any, requests: Mapping[str, Any]) -> StepPlan:
        """Decide for the step that ``schedule()`` has just put together.

        Args:
            output: vLLM's ``SchedulerOutput``.
            requests: vLLM's requests by id; ``num_computed_tokens`` counts this step already.
        """
        for request_id in output.finished_req_ids:
            self.tracked.pop(request_id, None)
        self._adopt((new.req_id for new in output.scheduled_new_reqs), requests)
        self._adopt(output.scheduled_cached_reqs.resumed_req_ids, requests)
        plan = StepPlan()
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self.tracked.get(request_id)
            if tracked is None:
                continue
            computed = requests[request_id].num_computed_tokens
            is_pruned = isinstance(requests[request_id].block_hashes, Unshared)
            if is_pruned and scheduled == computed:
                self._prune(plan, requests[request_id], tracked, computed)
            elif is_pruned or tracked.generation:
                plan.generations[request_id] = tracked.generation
            if tracked.trigger is None:
                continue
            place = tracked.target.place
            if place is not None and computed - scheduled < place < computed:
                raise RuntimeError(
                    f"uncomp: {request_id} is to be compacted after {place} tokens, but this vLLM "
                    f"runs tokens {computed - scheduled} to {computed} of it in one step"
                )
            if tracked.window and computed > tracked.trigger - tracked.window:
                first = max(0, tracked.trigger - tracked.window)
                if request_id in plan.record:  # pruned in this step
                    plan.queries_needed.append(request_id)
                    first = min(first, plan.record[request_id][0])
                plan.record[request_id] = (first, computed)
            if computed >= tracked.trigger:
                order = self._order(requests[request_id], tracked, computed)
                if order is not None:
                    plan.orders.append(order)
        return plan

    def commit(self, plan: StepPlan | None, answers: Iterable[Receipt | PruningReceipt]) -> None:
        """Give back the blocks of confirmed orders.

        Raises:
            RuntimeError: the worker ran other orders than were sent. Going on would free blocks
                that are still read, so the engine must stop.
        """
        orders = {order.request_id: order for order in (plan.orders if plan else ())}
        receipts = []
        for answer in answers:
            if isinstance(answer, PruningReceipt):
                self.counters.add("choose_seconds", answer.choose_seconds)
            else:
                receipts.append(answer)
        sent = {(o.request_id, o.generation) for o in orders.values()}
        run = {(r.request_id, r.generation) for r in receipts}
        if sent != run:
            raise RuntimeError(
                f"uncomp: orders sent and orders run differ: sent only {sorted(sent - run)}, run "
                f"only {sorted(run - sent)}. The worker is not running uncomp's worker class."
            )
        for receipt in receipts:
            order = orders[receipt.request_id]
            tracked = self.tracked.get(receipt.request_id)
            freed = 0
            # Aborted or preempted in the meantime: its blocks are gone already.
            if tracked is not None and tracked.pending is order:
                tracked.pending = None
                tracked.report.add(order, receipt)
                if receipt.request_id in self.manager.compacted:
                    freed = self.manager.release_prefix(receipt.request_id, order.first_kept)
            self.counters.compacted(order, receipt, freed)
            logger.debug(
                "compacted %s (%d): %d tokens, %d of %d full blocks kept, %d freed, "
                "scoring %.1f ms, moving %.1f ms",
                order.request_id,
                order.generation,
                order.num_tokens,
                len(order.kept_blocks),
                order.full_blocks,
                freed,
                receipt.score_seconds * 1e3,
                receipt.move_seconds * 1e3,
            )

    def _prune(self, plan: StepPlan, request: Any, tracked: Tracked, computed: int) -> None:
        assert self.schedule is not None
        request_id, target, own = request.request_id, tracked.target, tracked.target.settings.own
        kept = self._stages(target, computed)
        plan.prunings.append(Pruning(request_id, computed, kept, target.settings.protect, own))
        plan.record[request_id] = (max(0, computed - WIDEST), computed)
        read, whole = self.schedule.token_layers(computed, kept), computed * self.schedule.layers
        tracked.report.prefill_keep = read / whole
        self.counters.add("prompts_pruned")
        self.counters.add("prefill_token_layers", whole)
        self.counters.add("prefill_token_layers_read", read)

    def _stages(self, target: Target, tokens: int) -> tuple[int, ...]:
        """Tokens of a prompt that enter each stage of layers; the last: the fewest."""
        keep = target.settings.prefill_keep
        if self.schedule is None or keep == 1:
            return (tokens,)
        own = target.settings.own or self.config
        schedule = replace(self.schedule, floor=own.prefill_floor)
        protected = target.settings.protected_tokens
        forced = always_read(self.config.sinks, self.config.window, self.block_size, protected)
        return schedule.kept(tokens, keep, self.block_size, forced)

    def _adopt(self, request_ids: Iterable[str], requests: Mapping[str, Any]) -> None:
        for request_id in request_ids:
            target = self._target(requests[request_id])
            if target is None:
                self.tracked.pop(request_id, None)
                continue
            trigger = target.first_trigger(requests[request_id].num_tokens, self.max_model_len)
            own = target.settings.own or self.config
            window = own.window if needs_queries(own) else 0
            self.tracked[request_id] = Tracked(target, trigger, window)

    def _target(self, request: Any) -> Target | None:
        """The request's budget, or ``None`` (counted by reason) if it is served uncompressed."""
        params = request.sampling_params
        if params is None:
            return None
        if getattr(request, "resumable", False):
            self.counters.refused("streaming_input")
            return None
        try:
            target = self._target_of(request)
        except RequestError as error:
            # The front end answers these with a 400; only a foreign front end gets here.
            logger.warning("request %s is served uncompressed: %s", request.request_id, error)
            self.counters.refused("invalid_settings")
            return None
        if not target.settings.compress and target.settings.prefill_keep == 1:
            self.counters.refused("opted_out")
            return None
        return target

    def _target_of(self, request: Any) -> Target:
        given = request.sampling_params.extra_args
        settings = request_settings(given, self.config, request.num_prompt_tokens)
        if self.gaps is None and needs_words(settings.own or self.config):
            raise RequestError(NO_TOKENIZER)
        return Target.of(settings, settings.own or self.config, self.block_size)

    def report(self, request_id: str) -> dict[str, Any] | None:
        """What is kept of a request that asked to be told; ``None`` for others."""
        tracked = self.tracked.get(request_id)
        if tracked is None or not tracked.target.settings.report:
            return None
        return tracked.report.facts()

    def _gaps(self, request: Any, own: UncompConfig | None, tokens: int) -> bytes:
        """What the tokens of a request begin, if its scores are handed on by words."""
        if self.gaps is None or not needs_words(own or self.config):
            return b""
        # Sampled tokens that are still on their way are among the last ones, which stay anyway.
        return self.gaps(request.all_token_ids[:tokens]).tobytes()

    def _order(self, request: Any, tracked: Tracked, computed: int) -> Order | None:
        request_id = request.request_id
        full = computed // self.block_size
        held = tracked.kept + full - tracked.full_blocks
        if not tracked.target.worthwhile(computed, held):
            tracked.trigger = tracked.target.next_trigger(computed)
            return None
        keep = tracked.target.kept_blocks(computed)
        fresh = self.apart and tracked.generation > 0
        blocks = self.manager.make_private(request_id, full - keep, full, fresh)
        if blocks is None:
            self.counters.refused("no_free_block")  # tried again with the next step
            return None
        tracked.generation += 1
        tracked.full_blocks, tracked.kept = full, keep
        tracked.trigger = tracked.target.next_trigger(computed)
        tracked.pending = Order(
            request_id,
            computed,
            full,
            blocks,
            tracked.generation,
            tracked.target.settings.protect,
            tracked.target.settings.own,
            self._gaps(request, tracked.target.settings.own, computed),
        )
        self.manager.compacted[request_id] = full - keep
        return tracked.pending
