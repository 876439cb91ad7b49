"""One worker's compression state between the runner, the attention backend and the compactor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from uncomp.engine.by_config import ByConfig
from uncomp.engine.compactor import Compactor
from uncomp.engine.orders import PruningReceipt, Receipt, StepPlan
from uncomp.engine.state import CompressedRequests, Slot

if TYPE_CHECKING:
    from uncomp.engine.pruner import Pruner


@dataclass
class StepRows:
    """Which rows of a batch are compressed, and which queries are remembered.

    Attributes:
        slots: of the compressed rows, in batch order.
        compressed_rows, plain_rows: int64 row numbers.
        record: (source token [n], destination [n]) int64, or ``None``.
    """

    slots: list[Slot] = field(default_factory=list)
    compressed_rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    plain_rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    record: tuple[Tensor, Tensor] | None = None

    @property
    def compressed(self) -> bool:
        return bool(self.slots)


class QueryRing:
    """The last ``window`` queries of the requests about to be compacted.

    One buffer [layers, slots * window, query heads, head size]; position p of a request lies at
    ``slot * window + p % window``.
    """

    def __init__(self, layers: int, window: int, shape: tuple[int, int], dtype: torch.dtype):
        self.window, self.shape = window, shape
        self.buffer = torch.zeros(layers, 0, *shape, dtype=dtype)
        self._slots: dict[str, int] = {}
        self._free: list[int] = []

    def destination(self, request_id: str, first: int, last: int) -> np.ndarray:
        """Where positions [first, last) go (at most ``window`` of them)."""
        if request_id not in self._slots:
            self._slots[request_id] = self._take()
        at = np.arange(first, last) % self.window
        return at + self._slots[request_id] * self.window

    def last(self, request_id: str, num_tokens: int, window: int) -> Tensor:
        """[layers, w, query heads, head size], the last w = ``window`` (or all there are) queries
        before ``num_tokens``."""
        count = min(window, num_tokens)
        if request_id not in self._slots:
            raise RuntimeError(
                f"uncomp: no queries were recorded for {request_id}, which is to be compacted at "
                f"{num_tokens} tokens"
            )
        at = self.destination(request_id, num_tokens - count, num_tokens)
        return self.buffer[:, torch.from_numpy(at)]

    def of_layer(self, layer: int, request_id: str, num_tokens: int, window: int) -> Tensor:
        """[w, query heads, head size] of one layer, see `last`."""
        count = min(window, num_tokens)
        at = self.destination(request_id, num_tokens - count, num_tokens)
        return self.buffer[layer, torch.from_numpy(at)]

    def drop(self, request_id: str) -> None:
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._free.append(slot)

    def __len__(self) -> int:
        return len(self._slots)

    def _take(self) -> int:
        if not self._free:
            old = self.buffer.shape[1] // self.window
            new = max(4, 2 * old)
            grown = torch.zeros(
                self.buffer.shape[0], new * self.window, *self.shape, dtype=self.buffer.dtype
            )
            grown[:, : old * self.window] = self.buffer
            self.buffer = grown
            self._free = list(range(new - 1, old - 1, -1))
        return self._free.pop()


def check_generations(plan: StepPlan, have: dict[str, int]) -> None:
    """Compare the scheduler's count of compactions with the worker's.

    Args:
        have: compactions run, by request id.

    Raises:
        RuntimeError: they differ.
    """
    for request_id, generation in plan.generations.items():
        if have.get(request_id, 0) != generation:
            raise RuntimeError(
                f"uncomp: the scheduler says {request_id} was compacted {generation} times, this "
                f"worker knows of {have.get(request_id, 0)}"
            )


def pruned_step(plan: StepPlan | None, pruner: Pruner | None) -> AbstractContextManager[None]:
    """Around the forward pass of a step.

    Raises:
        RuntimeError: the scheduler prunes prompts, this worker does not.
    """
    if plan is None or not plan.prunings:
        return nullcontext()
    if pruner is None:
        raise RuntimeError("uncomp: the scheduler prunes prompts, this worker does not")
    return pruner.step(plan.prunings)


def note_batch(
    plan: StepPlan | None, pruner: Pruner | None, common: Any, row_ids: Callable[[], list[str]]
) -> None:
    """Tell the pruner which batch the runner has put together."""
    if plan is not None and plan.prunings and pruner is not None:
        ids = row_ids()[: common.num_reqs]
        pruner.batch(common, {name: row for row, name in enumerate(ids)})


def finish_prunings(plan: StepPlan | None, pruner: Pruner | None) -> list[PruningReceipt]:
    """After the forward pass of a step: record what its pruned prompts kept."""
    if plan is None or not plan.prunings or pruner is None:
        return []
    for request_id in {*pruner.finish()} - {*plan.queries_needed}:
        pruner.memory.forget_queries(request_id)
    [seconds] = pruner.clock.collect()
    return [PruningReceipt(seconds)]


class Seat:
    """State of one worker.

    Args:
        requests: where compressed heads live.
        ring: remembered queries; ``None`` if the policy needs none.
        compactors: run orders.
        row_ids: returns the request ids of the batch rows, in order.
        block_row: request id -> its row of block ids (append-only, int).

    Attributes:
        pruner: drops prompt tokens between layers; ``None``: the server prunes none.
    """

    def __init__(
        self,
        requests: CompressedRequests,
        ring: QueryRing | None,
        compactors: ByConfig[Compactor],
        row_ids: Callable[[], list[str]],
        block_row: Callable[[str], Tensor],
    ) -> None:
        self.requests, self.ring, self.compactors = requests, ring, compactors
        self._row_ids, self._block_row = row_ids, block_row
        self._plan: StepPlan | None = None
        self.pruner: Pruner | None = None
        self.orders_run = 0

    @property
    def queries(self) -> Tensor:
        assert self.ring is not None
        return self.ring.buffer

    def begin(self, plan: StepPlan, gone: set[str]) -> None:
        """Start a step: forget requests that ended or start over, then check agreement.

        Raises:
            RuntimeError: scheduler and worker disagree about a request's compactions; attending
                with either view would read wrong memory.
        """
        for request_id in gone:
            self.requests.drop(request_id)
            if self.ring is not None:
                self.ring.drop(request_id)
        have = {name: slot.generation for name, slot in self.requests.slots.items()}
        check_generations(plan, have)
        self._plan = plan

    def pruned_step(self) -> AbstractContextManager[None]:
        """Around the forward pass of the step that has begun."""
        return pruned_step(self._plan, self.pruner)

    def batch(self, common: Any) -> None:
        """Take note of a batch that the runner has put together."""
        note_batch(self._plan, self.pruner, common, self._row_ids)

    def step_rows(self, common: Any) -> StepRows | None:
        """Sort the rows of the batch; ``None`` if the step is none of our business."""
        plan = self._plan
        if plan is None or not (plan.generations or plan.record):
            return None
        ids = self._row_ids()[: common.num_reqs]
        starts = common.query_start_loc_cpu.numpy()
        seq_lens = common.seq_lens.numpy()
        step = StepRows(record=self._record(plan, ids, starts))
        compressed, plain = [], []
        for row, request_id in enumerate(ids):
            if request_id not in plan.generations:
                plain.append(row)
                continue
            slot = self.requests.slots[request_id]
            blocks = -(-int(seq_lens[row]) // self.requests.block_size)
            if blocks > slot.num_blocks:
                self.requests.extend(slot, common.block_table_tensor[row], blocks)
            step.slots.append(slot)
            compressed.append(row)
        step.compressed_rows = torch.tensor(compressed, dtype=torch.int64)
        step.plain_rows = torch.tensor(plain, dtype=torch.int64)
        return step

    def finish(self) -> list[Receipt | PruningReceipt]:
        """Run the orders of the step, after its forward pass."""
        plan, self._plan = self._plan, None
        receipts: list[Receipt | PruningReceipt] = [*finish_prunings(plan, self.pruner)]
        for order in plan.orders if plan is not None else ():
            compactor = self.compactors.of(order.own)
            queries = None
            if compactor.policy.needs_queries:
                assert self.ring is not None
                window = compactor.config.window
                queries = self.ring.last(order.request_id, order.num_tokens, window)
            row = self._block_row(order.request_id)
            receipts.append(compactor.run(order, row, queries))
            if self.ring is not None:
                self.ring.drop(order.request_id)
            self.orders_run += 1
        return receipts

    def _record(
        self, plan: StepPlan, ids: list[str], starts: np.ndarray
    ) -> tuple[Tensor, Tensor] | None:
        if self.ring is None or not plan.record:
            return None
        source, destination = [], []
        for row, request_id in enumerate(ids):
            if request_id not in plan.record:
                continue
            (first, end), last_token = plan.record[request_id], int(starts[row + 1])
            count = min(end - first, last_token - int(starts[row]))
            count = min(count, self.ring.window)
            source.append(np.arange(last_token - count, last_token))
            destination.append(self.ring.destination(request_id, end - count, end))
        if not source:
            return None
        return (
            torch.from_numpy(np.concatenate(source)),
            torch.from_numpy(np.concatenate(destination)),
        )
