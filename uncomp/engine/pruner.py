"""Drops prompt tokens between the layers of a step's forward pass.

A model's decoder layers are one after another given positions, hidden states and residual. While a
prompt is pruned, hooks on them take rows out of all three at the first layer of a stage, and
exchange the attention metadata of the layers that follow: to these, the request is a shorter
sequence that lies at the end of its own blocks. Such steps run vLLM's model code as it is, without
its compiled graph; all others are not touched, and no hook is left on the model.

The same on every device; where queries, keys and tables lie is a `PromptMemory`'s business
(`host_prompts.py`, `device_prompts.py`). Nothing here waits for the device.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context

from uncomp.config import UncompConfig
from uncomp.engine.device_clock import DeviceClock
from uncomp.engine.orders import Pruning
from uncomp.engine.pruned_model import GIVEN, PrunedModel
from uncomp.pruning import CHOICES, Choice, Schedule, choose_tokens


class PromptMemory(Protocol):
    """What a worker knows of the prompts that are pruned, and what it remembers of them.

    Attributes:
        block_size: tokens per block.
        layers: attention layers.
    """

    block_size: int
    layers: int

    def scores(
        self, choice: Choice, layer: int, order: Pruning, at: Tensor, blocks: Tensor
    ) -> Tensor:
        """What the last queries of a prompt give the tokens that a layer has read.

        Args:
            at: [n] int64, their positions.
            blocks: [ceil(n / block_size)] int32, ids of the blocks that hold them.

        Returns:
            [n] float32, summed over the heads of this rank, see `Choice.scores`.
        """

    def metadata(self, common: Any, before: Any) -> Any:
        """The backend's metadata of what is left of a batch.

        Args:
            common: vLLM's common metadata of it.
            before: the backend's metadata of the layer before.
        """

    def place(self, order: Pruning, blocks: Tensor, kept: list[Tensor]) -> None:
        """Record what a prompt has left in every layer, at the end of its blocks.

        Args:
            blocks: [full blocks] int32, ids of the prompt's full blocks.
            kept: per layer [n] int64, the positions it holds, ascending; a whole number of blocks
                fewer than the prompt has, and its last ones among them. Layers of a stage share a
                tensor.
        """

    def forget_queries(self, request_id: str) -> None:
        """The queries of a prompt are of no more use."""

    def warm_up(self, blocks: int) -> None:
        """Before requests come; blocks 1 to `blocks` of the caches hold zeros."""


@dataclass
class _Prompt:
    """One prompt that is pruned in this step.

    Attributes:
        row: its row in the batch.
        at: [n] int64, positions that the present stage reads.
        blocks: [width] int32, its row of vLLM's block table.
        kept: what `at` was in every layer so far.
    """

    order: Pruning
    row: int = -1
    at: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    blocks: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))
    kept: list[Tensor] = field(default_factory=list)


class Pruner:
    """Runs the prunings of one worker's steps.

    Args:
        config: the server's settings.
        schedule: first layers of the stages.
        parts: of the model.
        names: of the attention layers, in order.
        memory: of this worker.
        device: that it runs on.
        rank: names the trace file.
    """

    def __init__(
        self,
        config: UncompConfig,
        schedule: Schedule,
        parts: PrunedModel,
        names: list[str],
        memory: PromptMemory,
        device: torch.device,
        rank: int = 0,
    ) -> None:
        self.clock = DeviceClock(device, parts=1)
        self.config, self.schedule, self.parts = config, schedule, parts
        self.names, self.memory = names, memory
        self._trace = Path(config.trace, f"pruned-{rank}.jsonl") if config.trace else None
        self._prompts: list[_Prompt] = []

    @contextmanager
    def step(self, prunings: Sequence[Pruning]) -> Iterator[None]:
        """Everything that the model computes inside is pruned."""
        self._prompts = [_Prompt(order) for order in prunings]
        with ExitStack() as stack:
            for module in self.parts.compiled:
                stack.callback(setattr, module, "do_not_compile", module.do_not_compile)
                module.do_not_compile = True
            for i in range(self.schedule.starts[0], len(self.parts.layers)):
                layer = self.parts.layers[i]
                hook = layer.register_forward_pre_hook(self._hook(i, layer), with_kwargs=True)
                stack.callback(hook.remove)
            hook = self.parts.model.register_forward_hook(self._restore)
            stack.callback(hook.remove)
            yield

    def batch(self, common: Any, row_of: dict[str, int]) -> None:
        """Take note of the step's batch, before the model runs.

        Args:
            common: vLLM's common attention metadata.
            row_of: rows of the requests.
        """
        self._common = common
        self._starts = self._ends = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        self._device = common.query_start_loc.device
        # Not `num_actual_tokens`, which vLLM may pad.
        self._index = torch.arange(self._starts[-1], device=self._device)
        for prompt in self._prompts:
            prompt.row = row_of[prompt.order.request_id]
            prompt.at = torch.arange(prompt.order.num_tokens, device=self._device)
            prompt.blocks = common.block_table_tensor[prompt.row]
            tokens = self._starts[prompt.row + 1] - self._starts[prompt.row]
            if tokens != prompt.order.num_tokens:
                raise RuntimeError(
                    f"uncomp: {prompt.order.request_id} is to be pruned as a whole, but "
                    f"{tokens} of its {prompt.order.num_tokens} tokens are in this step"
                )

    def finish(self) -> list[str]:
        """Record what the prompts of the step kept; after its forward pass.

        Returns:
            The requests.

        Raises:
            RuntimeError: a prompt was not pruned; its blocks are not what the scheduler thinks.
        """
        done, self._prompts = self._prompts, []
        for prompt in done:
            if len(prompt.at) != prompt.order.kept[-1]:
                raise RuntimeError(
                    f"uncomp: {prompt.order.request_id} was not pruned: this vLLM runs the layers "
                    f"of {type(self.parts.model).__name__} without their hooks; drop prefill_keep"
                )
            self._leave(prompt, self.memory.layers)
            full = prompt.order.num_tokens // self.memory.block_size
            self.memory.place(prompt.order, prompt.blocks[:full], prompt.kept)
            self._write_trace(prompt)
        return [prompt.order.request_id for prompt in done]

    def _hook(self, index: int, layer: nn.Module) -> Callable[..., Any]:
        signature = inspect.signature(layer.forward)

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = signature.bind(*args, **kwargs)
            if index in self.schedule.starts:
                take = self._enter(self.schedule.starts.index(index) + 1)
                for name in GIVEN[1:]:
                    given.arguments[name] = given.arguments[name].index_select(0, take)
                self._positions = given.arguments["positions"].index_select(0, self._index)
            given.arguments["positions"] = self._positions
            return given.args, given.kwargs

        return enter

    def _enter(self, stage: int) -> Tensor:
        """Choose for every prompt and exchange the metadata of the layers from here on.

        Returns:
            [n] int64, rows of the batch as it was that go on.
        """
        first = self.schedule.starts[stage - 1]
        chosen = {}
        for prompt in self._prompts:
            self._leave(prompt, first)
            mark = self.clock.mark()
            chosen[prompt.row] = self._choose(prompt, stage, first - 1)
            self.clock.add(mark, self.clock.mark())
            prompt.at = prompt.at[chosen[prompt.row]]
        take, slots, starts = [], [], [0]
        for row, (begin, end) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            rows = chosen.get(row)
            if rows is None:
                rows = torch.arange(end - begin, device=self._device)
            take.append(begin + rows)
            last = self._ends[row + 1]
            slots.append(torch.arange(last - len(rows), last, device=self._device))
            starts.append(starts[-1] + len(rows))
        taken = torch.cat(take)
        self._index, self._starts = self._index[taken], starts
        slot_mapping = self._common.slot_mapping[torch.cat(slots)]
        context: Any = get_forward_context()  # one batch (no dual batch overlap): dictionaries
        before = context.attn_metadata[self.names[first - 1]]
        metadata = self.memory.metadata(self._shorter(starts, slot_mapping), before)
        later = self.names[first:]
        context.attn_metadata |= dict.fromkeys(later, metadata)
        if context.slot_mapping:  # older vLLM: in the metadata alone
            context.slot_mapping |= dict.fromkeys(later, slot_mapping)
        return taken

    def _shorter(self, starts: list[int], slot_mapping: Tensor) -> Any:
        """vLLM's common metadata of the rows that are left."""
        common, size = self._common, self.memory.block_size
        seq_lens, table = common.seq_lens.clone(), common.block_table_tensor.clone()
        bound = getattr(common, "seq_lens_cpu_upper_bound", None)
        changed: dict[str, Any] = {}
        if bound is not None:
            changed["seq_lens_cpu_upper_bound"] = bound = bound.clone()
        for prompt in self._prompts:
            left = len(prompt.at)
            dropped = (prompt.order.num_tokens - left) // size
            seq_lens[prompt.row] = left
            table[prompt.row] = table[prompt.row].roll(-dropped)
            if bound is not None:
                bound[prompt.row] = left
        begin = torch.tensor(starts, dtype=common.query_start_loc.dtype)
        # Fields of vLLM's own that were derived from what is exchanged here.
        derived = [f.name for f in dataclasses.fields(common) if f.name.startswith("_")]
        return common.replace(
            **dict.fromkeys(derived),
            **changed,
            query_start_loc=begin.to(self._device, non_blocking=True),
            query_start_loc_cpu=begin,
            seq_lens=seq_lens,
            num_actual_tokens=starts[-1],
            max_query_len=int((begin[1:] - begin[:-1]).max()),
            block_table_tensor=table,
            slot_mapping=slot_mapping,
        )

    def _choose(self, prompt: _Prompt, stage: int, layer: int) -> Tensor:
        """[n] int64, indices into the positions that the layer read."""
        order, size = prompt.order, self.memory.block_size
        choice = CHOICES[(order.own or self.config).prefill_scores]
        total = order.num_tokens
        blocks = prompt.blocks[(total - len(prompt.at)) // size : -(-total // size)]
        scores = self.memory.scores(choice, layer, order, prompt.at, blocks)
        if get_tensor_model_parallel_world_size() > 1:
            scores = tensor_model_parallel_all_reduce(scores)
        forced = prompt.at < self.config.sinks
        for start, end in order.protect:
            forced |= (prompt.at >= start) & (prompt.at < end)
        recent = max(self.config.window, total % size)
        return choose_tokens(scores, forced, recent, order.kept[stage - 1], choice)

    def _leave(self, prompt: _Prompt, layer: int) -> None:
        """All layers before this one have read what they read."""
        prompt.kept += [prompt.at] * (layer - len(prompt.kept))

    def _restore(self, _: nn.Module, args: Any, output: Tensor) -> Tensor:
        """A row for every token again; those that stopped on the way are zero."""
        full = output.new_zeros(self._common.num_actual_tokens, *output.shape[1:])
        return full.index_copy_(0, self._index, output)

    def _write_trace(self, prompt: _Prompt) -> None:
        if self._trace is None:
            return
        self._trace.parent.mkdir(parents=True, exist_ok=True)
        starts = (0, *self.schedule.starts)
        record = {
            "request_id": prompt.order.request_id,
            "num_tokens": prompt.order.num_tokens,
            "starts": starts,
            "kept": [prompt.kept[start].tolist() for start in starts],
        }
        with open(self._trace, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
