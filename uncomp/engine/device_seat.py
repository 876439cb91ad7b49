"""One GPU worker's compression state between the runner, the attention backend and the compactor.

The host side of a step: which rows are compressed, which queries are remembered, which orders run.
What the attention kernels read of it lies in buffers that never move.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from uncomp.config import UncompConfig
from uncomp.engine.by_config import ByConfig
from uncomp.engine.device_compactor import DeviceCompactor, Job
from uncomp.engine.device_state import DeviceRequests, QueryStore, to_device
from uncomp.engine.orders import Order, PruningReceipt, Receipt, StepPlan
from uncomp.engine.seat import check_generations, finish_prunings, note_batch, pruned_step
from uncomp.kernels.decode import DecodeWorkspace, decode, plan
from uncomp.kernels.paged import Caches, Rows
from uncomp.kernels.record.launch import record

if TYPE_CHECKING:
    from uncomp.engine.pruner import Pruner


class Runner(Protocol):
    """What is needed of vLLM's model runner."""

    def row_ids(self) -> list[str]:
        """Request ids of the batch rows, in order."""

    def block_table(self) -> Tensor:
        """[rows, width] int32 on the device, as of this step."""

    def replace_blocks(self, request_id: str, first: int, blocks: tuple[int, ...]) -> None:
        """Put these block ids at columns [first, ...) of a request's row, from the next step on."""


@dataclass(frozen=True)
class DecodeRows:
    """The rows of one step that the decode kernel attends to: the first ones of the batch.

    Attributes:
        rows: block rows, lengths and slots of these requests.
        starts: [R + 1] int32, first token of each row; padding rows have none.
        tokens: tokens of the batch up to the end of these rows.
    """

    rows: Rows
    starts: Tensor
    tokens: int


class DeviceSeat:
    """State of one worker with a GPU.

    Args:
        requests: where compressed heads live.
        store: remembered queries; None if the policy needs none.
        compactors: run orders.
        caches: KV caches of the attention layers.
        workspace: buffers of the decode kernel.
        max_requests: rows of a batch at most.
        dtype: of queries.
        runner: the model runner.

    Attributes:
        pruner: drops prompt tokens between layers; None: the server prunes none.
    """

    def __init__(
        self,
        requests: DeviceRequests,
        store: QueryStore | None,
        compactors: ByConfig[DeviceCompactor],
        caches: Caches,
        workspace: DecodeWorkspace,
        max_requests: int,
        dtype: torch.dtype,
        runner: Runner,
    ) -> None:
        self.requests, self.store, self.compactors = requests, store, compactors
        self.caches, self.workspace, self._runner = caches, workspace, runner
        self._dtype = dtype
        device = caches.device
        self._slots = torch.full((max_requests,), -1, dtype=torch.int32, device=device)
        self._addresses = torch.zeros(max_requests, dtype=torch.int64, device=device)
        self._slots_now = [-1] * max_requests
        self._addresses_now = [0] * max_requests
        #: [layers] int64: how often the decode path of each layer ran on the device since the first
        #: scheduled step; graphs that replay it count too
        self.executions = torch.zeros(caches.layers, dtype=torch.int64, device=device)
        self._remembered = torch.zeros_like(self.executions)
        #: scheduled steps with rows for the decode path
        self.decode_steps = 0
        self._plan: StepPlan | None = None
        self._started = False
        self.pruner: Pruner | None = None
        self.orders_run = 0

    def pruned_step(self) -> AbstractContextManager[None]:
        """Around the forward pass of the step that has begun."""
        return pruned_step(self._plan, self.pruner)

    def batch(self, common: Any) -> None:
        """Take note of a batch that the runner has put together."""
        note_batch(self._plan, self.pruner, common, self._runner.row_ids)

    def begin(self, plan: StepPlan, gone: set[str]) -> None:
        """Start a step: forget requests that ended or start over, then check agreement.

        Raises:
            RuntimeError: scheduler and worker disagree about a request's compactions.
        """
        for request_id in gone:
            self.requests.drop(request_id)
            if self.store is not None:
                self.store.drop(request_id)
        have = {name: slot.generation for name, slot in self.requests.slots.items()}
        check_generations(plan, have)
        if not self._started:
            self.executions.zero_()  # forget warm-up
            self._started = True
        self._plan = plan

    def warm_up(self, softcap: float) -> None:
        """Compile every kernel now: in a captured graph it cannot be, and requests would wait.

        Writes to the first blocks of the cache, which nobody uses yet.

        Args:
            softcap: of the attention logits.

        Raises:
            RuntimeError: the cache is too small for a compaction.
        """
        caches, device = self.caches, self.caches.device
        compactor, name = self.compactors.default, "uncomp-warm-up"
        config = compactor.config
        size = caches.block_size
        blocks = 3 + -(-(max(config.window, config.recent_tokens) + config.sinks) // size)
        if caches.tensors[0].shape[0] <= blocks:
            raise RuntimeError(f"uncomp: a cache of at least {blocks + 1} blocks is needed")
        for cache in caches.tensors:
            cache[: blocks + 1].zero_()
        width = self._runner.block_table().shape[1]
        table = torch.zeros(1, width, dtype=torch.int32, device=device)
        table[0, :blocks] = torch.arange(1, blocks + 1, device=device)
        heads, group = caches.heads, self.workspace.group
        query = torch.zeros(1, heads * group, caches.head_size, dtype=self._dtype, device=device)
        lengths = torch.full((1,), blocks * size, dtype=torch.int32, device=device)
        starts = torch.arange(2, dtype=torch.int32, device=device)
        rows = DecodeRows(Rows(table, lengths, self._slots[:1]), starts, 1)
        plan(self.workspace, rows.rows, starts, self.requests.holdings, size)
        self.attend(0, query, torch.empty_like(query), rows, 1.0, softcap)
        queries = None
        if self.store is not None:
            zero = torch.zeros(1, dtype=torch.int64, device=device)
            self.remember(0, query, (zero, zero))
            queries = query.expand(config.window, -1, -1).expand(caches.layers, -1, -1, -1)
        kept = tuple(range(2, blocks + 1))
        order = Order(name, blocks * size, blocks, kept, 1)
        compactor.run([Job(order, 0, queries)], table)
        self.requests.drop(name)
        if self.pruner is not None:
            self.pruner.memory.warm_up(blocks)

    def any_compressed(self) -> bool:
        """Whether a row of this step is compressed."""
        return self._plan is not None and bool(self._plan.generations)

    def decode_rows(self, common: Any, count: int, tokens: int) -> DecodeRows:
        """Prepare the device for the first `count` rows of the batch; they have `tokens` tokens.

        Raises:
            RuntimeError: a compressed row lies beyond them.
        """
        ids = self._runner.row_ids() if self._plan is not None else []
        ids = ids[: common.num_reqs]
        for request_id in ids[count:]:
            if request_id in self.requests:
                raise RuntimeError(
                    f"uncomp: compressed request {request_id} has several tokens in one step; only "
                    "one is supported"
                )
        self._set_slots([self.requests.index_of(request_id) for request_id in ids[:count]])
        self._set_addresses(ids[:count], common)
        rows = Rows(common.block_table_tensor[:count], common.seq_lens[:count], self._slots[:count])
        starts = common.query_start_loc[: count + 1]
        plan(self.workspace, rows, starts, self.requests.holdings, self.caches.block_size)
        self.decode_steps += self._plan is not None
        return DecodeRows(rows, starts, tokens)

    def prefill_record(self, common: Any, first_row: int) -> tuple[Tensor, Tensor] | None:
        """(token [n] int64, address [n] int64) of queries to remember in rows from `first_row`."""
        plan = self._plan
        if self.store is None or plan is None or not plan.record:
            return None
        starts = common.query_start_loc_cpu.tolist()
        source: list[int] = []
        addresses: list[int] = []
        for row, request_id in enumerate(self._runner.row_ids()[: common.num_reqs]):
            if row < first_row or request_id not in plan.record:
                continue
            first, end = plan.record[request_id]
            count = min(end - first, starts[row + 1] - starts[row])
            count = min(count, self.store.window)
            source += range(starts[row + 1] - count, starts[row + 1])
            addresses += self.store.addresses(request_id, end - count, end)
        if not source:
            return None
        device = self.caches.device
        return to_device(source, torch.int64, device), to_device(addresses, torch.int64, device)

    def attend(
        self,
        layer: int,
        query: Tensor,
        output: Tensor,
        rows: DecodeRows,
        scale: float,
        softcap: float,
    ) -> None:
        """Decode attention of one layer; runs inside captured graphs.

        Args:
            query, output: [tokens, query heads, head size].
        """
        record(query, self._addresses[: rows.tokens], self.executions, layer)
        decode(
            self.workspace,
            self.caches,
            layer,
            query,
            output,
            rows.starts,
            rows.rows,
            self.requests.holdings,
            scale,
            softcap,
        )

    def remember(self, layer: int, query: Tensor, where: tuple[Tensor, Tensor]) -> None:
        """Copy queries found by `prefill_record`."""
        source, addresses = where
        record(query, addresses, self._remembered, layer, source)

    def finish(self) -> list[Receipt | PruningReceipt]:
        """Run the orders of the step, after its forward pass."""
        plan, self._plan = self._plan, None
        receipts: list[Receipt | PruningReceipt] = [*finish_prunings(plan, self.pruner)]
        if plan is None or not plan.orders:
            return receipts
        ids = self._runner.row_ids()
        table = self._runner.block_table()
        jobs: dict[UncompConfig | None, list[Job]] = {}
        for order in plan.orders:
            queries = self._window(order)
            job = Job(order, ids.index(order.request_id), queries)
            jobs.setdefault(order.own, []).append(job)
        for own, same in jobs.items():
            receipts += self.compactors.of(own).run(same, table)
        for order in plan.orders:
            if self.store is not None:
                self.store.drop(order.request_id)
            self._runner.replace_blocks(order.request_id, order.first_kept, order.kept_blocks)
        self.orders_run += len(plan.orders)
        return receipts

    def _window(self, order: Order) -> Tensor | None:
        """The queries that score an order, if its policy wants any."""
        compactor = self.compactors.of(order.own)
        if not compactor.policy.needs_queries:
            return None
        assert self.store is not None
        return self.store.last(order.request_id, order.num_tokens, compactor.config.window)

    def _set_slots(self, slots: list[int]) -> None:
        slots = slots + [-1] * (len(self._slots_now) - len(slots))
        if slots != self._slots_now:
            self._slots.copy_(to_device(slots, torch.int32, self._slots.device))
            self._slots_now = slots

    def _set_addresses(self, ids: list[str], common: Any) -> None:
        addresses = [0] * len(self._addresses_now)
        plan = self._plan
        if self.store is not None and plan is not None and plan.record:
            starts = common.query_start_loc_cpu.tolist()
            for row, request_id in enumerate(ids):
                if request_id in plan.record and starts[row + 1] > starts[row]:
                    first, end = plan.record[request_id]
                    if end > first:
                        [addresses[starts[row]]] = self.store.addresses(request_id, end - 1, end)
        if addresses != self._addresses_now:
            copied = to_device(addresses, torch.int64, self._addresses.device)
            self._addresses.copy_(copied)
            self._addresses_now = addresses
