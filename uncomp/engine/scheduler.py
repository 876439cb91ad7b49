"""vLLM's schedulers with the planner attached; installed through ``scheduler_cls``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from uncomp.engine.cache_manager import CompressedManager
from uncomp.engine.calibrated import schedule_of, shares_layers
from uncomp.engine.counters import Counters, counter_file
from uncomp.engine.orders import ATTRIBUTE
from uncomp.engine.planner import CompactionPlanner
from uncomp.engine.settings import CPU_WORKER, engine_config
from uncomp.engine.vocabulary import token_gaps
from uncomp.request_policy import needs_words

logger = logging.getLogger("vllm.uncomp")

if TYPE_CHECKING:
    _Base = Scheduler
else:
    _Base = object


class _Compacting(_Base):
    """Mixed in before a vLLM scheduler: plans after ``schedule``, commits before the update."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = engine_config(self.vllm_config)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        if len(managers) != 1 or not isinstance(managers[0], CompressedManager):
            raise RuntimeError(
                f"uncomp: expected one KV-cache group managed by CompressedManager, got "
                f"{[type(m).__name__ for m in managers]}; this model mixes attention kinds or the "
                f"worker did not install its cache spec"
            )
        self._manager = managers[0]
        rank = self.vllm_config.parallel_config.data_parallel_index
        self._counters = Counters(counter_file(self.vllm_config.instance_id, rank))
        groups = self.kv_cache_config.kv_cache_groups
        self._counters["block_bytes"] = sum(
            group.kv_cache_spec.page_size_bytes * len(group.layer_names) for group in groups
        )
        hf_config = self.vllm_config.model_config.hf_text_config
        schedule = schedule_of(config, hf_config)
        on_cpu = self.vllm_config.parallel_config.worker_cls == CPU_WORKER
        self._planner = CompactionPlanner(
            config,
            self._manager,
            self.max_model_len,
            self._counters,
            schedule,
            wide_rows=on_cpu,
            # Devices move one layer after the other, CPUs read all of them first.
            apart=shares_layers(config) and not on_cpu,
            gaps=token_gaps(self.vllm_config.model_config, now=needs_words(config)),
        )
        logger.info(
            "uncomp is active in the scheduler: policy=%s %s, window=%d, recent=%d, sinks=%d, "
            "pooling=%s %d, min_tokens=%d, recompact_every=%d, block size %d, %d blocks",
            config.policy,
            f"keep={config.keep}" if config.keep is not None else f"budget={config.budget}",
            config.window,
            config.recent_tokens,
            config.sinks,
            config.pooling_kind,
            config.pooling,
            config.min_tokens,
            config.recompact_every,
            self._manager.block_size,
            self.kv_cache_manager.block_pool.num_gpu_blocks,
        )

        if schedule is not None:
            logger.info(
                "uncomp prunes prompts: prefill_keep=%s, scores=%s, stages start at layers %s of "
                "%d, floor %d tokens",
                config.prefill_keep,
                config.prefill_scores,
                list(schedule.starts),
                schedule.layers,
                schedule.floor,
            )
        # Our own hook, see below; models with Mamba layers are refused.
        self.need_mamba_block_aligned_split = True

    def add_request(self, request: Any) -> None:
        self._planner.admit(request)
        super().add_request(request)

    def _mamba_block_aligned_split(
        self, request: Any, num_new_tokens: int, *cached: int, **more: int
    ) -> int:
        """Asked by vLLM for every request how many of its tokens may run in a step."""
        start = request.num_computed_tokens + sum(cached) + sum(more.values())
        return self._planner.chunk(request, start, num_new_tokens)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        plan = self._planner.plan(output, self.requests)
        self._counters.add("orders_sent", len(plan.orders))
        setattr(output, ATTRIBUTE, plan)
        self._observe()
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        receipts = getattr(model_runner_output, ATTRIBUTE, ())
        self._planner.commit(getattr(scheduler_output, ATTRIBUTE, None), receipts)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._report(outputs)
        self._observe()
        return outputs

    def _report(self, outputs: dict[int, Any]) -> None:
        """Tell requests that asked what is kept of them.

        With every output, not only the last: the end of an answer by a stop string is seen by the
        front end alone. vLLM's field for facts about a request's KV cache is free: KV connectors
        are refused.
        """
        for of_client in outputs.values():
            for output in of_client.outputs:
                facts = self._planner.report(output.request_id)
                if facts is not None:
                    output.kv_transfer_params = {"uncomp": facts}

    def shutdown(self) -> None:
        super().shutdown()
        self._counters.remove()

    def _observe(self) -> None:
        pool = self.kv_cache_manager.block_pool
        held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one is the null block
        counters = self._counters
        counters["blocks_held"] = held
        counters["blocks_held_max"] = max(held, counters["blocks_held_max"])
        running = len(self.running)
        counters["requests_running_max"] = max(running, counters["requests_running_max"])


class CompactingScheduler(_Compacting, Scheduler):
    """For engines without async scheduling (CPU)."""


class CompactingAsyncScheduler(_Compacting, AsyncScheduler):
    """For engines with async scheduling."""
