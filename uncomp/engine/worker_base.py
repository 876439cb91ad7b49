"""What workers on every device have in common: orders in, receipts out."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from uncomp.engine import conflicts
from uncomp.engine.cache_manager import CompressedSpec
from uncomp.engine.orders import ATTRIBUTE, PruningReceipt, Receipt, StepPlan
from uncomp.engine.rotaries import rotaries
from uncomp.engine.settings import engine_config, make_policy
from uncomp.patches import engine_config as engine_config_patch
from uncomp.rotary import Rotary

logger = logging.getLogger("vllm.uncomp")

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase as _Worker
else:
    _Worker = object


class AnySeat(Protocol):
    """State between runner, attention backend and compactor."""

    orders_run: int

    def begin(self, plan: StepPlan, gone: set[str]) -> None: ...

    def pruned_step(self) -> AbstractContextManager[None]: ...

    def finish(self) -> list[Receipt | PruningReceipt]: ...


class CompactingWorker(_Worker):
    """Mixed in before a vLLM worker: runs the scheduler's orders between forward passes.

    Attributes:
        stock_backend: vLLM's attention backend that the layers would get.
        backend: the class they get instead, a subclass of it.
    """

    stock_backend: ClassVar[AttentionBackendEnum]
    backend: ClassVar[Any]
    model_runner: Any
    device: Any

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._uncomp = engine_config(vllm_config)
        self._policy = make_policy(self._uncomp)
        self._seat: AnySeat | None = None
        self._receipts: list[Receipt | PruningReceipt] = []

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        # The platform picks the backend: re-point its choice while the layers are being made, and
        # not longer, so that another engine in this process keeps vLLM's own.
        own = self.stock_backend.get_path()
        register_backend(self.stock_backend, self._backend_path())
        _cached_get_attn_backend.cache_clear()
        try:
            super().load_model(*args, **kwargs)
        finally:
            register_backend(self.stock_backend, own)
            _cached_get_attn_backend.cache_clear()

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        specs = super().get_kv_cache_spec()
        conflicts.check_layers(specs, self._attention_layers())
        window = self._uncomp.window if self._policy.needs_queries else 0
        return {
            name: CompressedSpec.of(cast(FullAttentionSpec, spec), window)
            for name, spec in specs.items()
        }

    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any) -> Any:
        try:
            return self._execute(scheduler_output)
        except Exception:
            if self._heard():
                raise
            # vLLM drops what other ranks raise and waits for the one it hears, which waits for
            # this one: end the process, which vLLM notices.
            logger.exception("worker %d cannot go on; it ends, and the engine with it", self.rank)
            raise SystemExit(1) from None

    def _heard(self) -> bool:
        """Whether vLLM's executor takes its answers from this rank: the first of the last stage."""
        parallel = self.vllm_config.parallel_config
        if parallel.distributed_executor_backend != "mp":
            return True  # one process, or an executor that hears all
        return self.rank == parallel.world_size - parallel.tensor_parallel_size

    def _execute(self, scheduler_output: Any) -> Any:
        plan: StepPlan | None = getattr(scheduler_output, ATTRIBUTE, None)
        if self._seat is None or plan is None:
            return super().execute_model(scheduler_output)  # type: ignore[safe-super]
        gone = set(scheduler_output.finished_req_ids)
        gone |= scheduler_output.scheduled_cached_reqs.resumed_req_ids
        gone |= set(scheduler_output.preempted_req_ids or ())
        gone.update(new.req_id for new in scheduler_output.scheduled_new_reqs)
        self._seat.begin(plan, gone)
        with self._seat.pruned_step():
            output = super().execute_model(scheduler_output)  # type: ignore[safe-super]
        self._receipts = self._seat.finish()
        return self._with_receipts(output)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_receipts(super().sample_tokens(*args, **kwargs))

    def _report(self) -> dict[str, Any]:
        """Facts about this process, the same on every device."""
        layers = self._attention_layers()
        return {
            "pid": os.getpid(),
            "rank": self.rank,
            "plugin": engine_config_patch.PATCH.applied(),
            "worker": type(self).__name__,
            "runner": f"{type(self.model_runner).__module__}.{type(self.model_runner).__name__}",
            "backends": sorted({type(layer.impl).__name__ for layer in layers.values()}),
            "layers": len(layers),
            "rotary_layers": sum(
                found is not None for found in rotaries(self.model_runner.get_model(), layers)
            ),
            "orders_run": self._seat.orders_run if self._seat else 0,
        }

    def _with_receipts(self, output: Any) -> Any:
        # None: the sampled tokens (and with them the answer to the scheduler) follow later.
        if output is not None and self._receipts:
            # Asynchronous outputs are answered with what they carry once it is on the host.
            answer = getattr(output, "_model_runner_output", output)
            setattr(answer, ATTRIBUTE, self._receipts)
            self._receipts = []
        return output

    def _only_builder(self) -> Any:
        """The metadata builder of the only attention group.

        Raises:
            RuntimeError: there are others, or layers that run on another backend.
        """
        builders = [
            group.get_metadata_builder()
            for groups in self.model_runner.attn_groups
            for group in groups
        ]
        wanted = self.backend.get_builder_cls()
        if len(builders) != 1 or not isinstance(builders[0], wanted):
            raise RuntimeError(
                f"uncomp: all attention layers must be on vLLM's backend "
                f"{self.stock_backend.name}, got {[type(b).__name__ for b in builders]}; set "
                f"--attention-backend {self.stock_backend.name}"
            )
        return builders[0]

    @classmethod
    def _backend_path(cls) -> str:
        return f"{cls.backend.__module__}.{cls.backend.__qualname__}"

    def _attention_layers(self) -> dict[str, Attention]:
        return get_layers_from_vllm_config(self.vllm_config, Attention)

    def _rotaries(self) -> list[Rotary | None]:
        """How the keys of every attention layer are rotated.

        Raises:
            RuntimeError: the policy has to know, and this model does not tell.
        """
        model = self.model_runner.get_model()
        found = rotaries(model, self._attention_layers())
        if all(found) or not self._has_rope():
            return found
        where = f"uncomp: RoPE was not found in {type(model).__name__}"
        if self._policy.needs_rotary:
            raise RuntimeError(
                f"{where}, and policy {self._policy.name!r} takes it back from the keys; use "
                f"another policy, e.g. key_difference"
            )
        # A request may bring such a policy, and an error then would end the engine for all.
        logger.warning(
            "%s: policies that take it back from the keys (prerope_key_difference, hybrid) score "
            "requests like key_difference",
            where,
        )
        return found

    def _has_rope(self) -> bool:
        text = self.model_config.hf_text_config
        return any(getattr(text, name, None) for name in ("rope_parameters", "rope_theta"))

    def _row_ids(self) -> list[str]:
        return self.model_runner.input_batch.req_ids

    def _host_row(self, request_id: str) -> Tensor:
        """Block ids of a request on the host, a view of vLLM's own table."""
        batch = self.model_runner.input_batch
        row = batch.block_table[0].block_table.np[batch.req_id_to_index[request_id]]
        return torch.from_numpy(row)
