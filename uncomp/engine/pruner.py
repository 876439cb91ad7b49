"""Drops prompt tokens between the layers of a step's forward pass.

A model's decoder layers are one after another given positions, hidden states and residual. While a
prompt is pruned, hooks on them take rows out of all three at the first layer of a stage, and
exchange the attention metadata of the layers that follow: to these, the request is a shorter
sequence that lies at the end of its own blocks. Such steps run vLLM's model code as it is, without
its compiled graph; all others are not touched, and no hook is left on the model.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context

from uncomp.config import UncompConfig
from uncomp.engine.compactor import LayerCache
from uncomp.engine.cpu_layout import CacheLayout
from uncomp.engine.orders import Pruning
from uncomp.engine.seat import QueryRing
from uncomp.engine.state import CompressedRequests
from uncomp.pruning import CHOICES, Schedule, choose_tokens

#: what a decoder layer is given, and what of it has a row per token
_GIVEN = ("positions", "hidden_states", "residual")


@dataclass
class _Prompt:
    """One prompt that is pruned in this step.

    Attributes:
        row: its row in the batch.
        at: [n] int64, positions that the present stage reads.
        kept: the same for every layer so far.
    """

    order: Pruning
    row: int
    at: Tensor
    kept: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class PrunedModel:
    """The parts of a vLLM model that pruning hooks into.

    Attributes:
        model: its output has a row per token.
        layers: decoder layers, in order.
        compiled: modules that vLLM calls through a compiled graph.
    """

    model: nn.Module
    layers: list[nn.Module]
    compiled: list[Any]

    @classmethod
    def of(cls, model: nn.Module, attention: Sequence[str]) -> PrunedModel:
        """Find them.

        Args:
            attention: names of the attention modules, in order, one per decoder layer.

        Raises:
            RuntimeError: the decoder layers do not take positions, hidden states and residual.
        """
        modules = dict(model.named_modules())
        layers = [_decoder_layer(modules, name) for name in attention]
        for layer in layers:
            names = list(inspect.signature(layer.forward).parameters)
            if not set(_GIVEN) <= set(names):
                raise RuntimeError(
                    f"uncomp: prompts of {type(model).__name__} cannot be pruned: its layers "
                    f"({type(layer).__name__}) take {names}, not {list(_GIVEN)}; drop prefill_keep"
                )
        compiled = [m for m in modules.values() if hasattr(m, "do_not_compile")]
        return cls(model, layers, compiled)


class Pruner:
    """Runs the prunings of one worker's steps.

    Args:
        config: the server's settings.
        schedule: first layers of the stages.
        parts: of the model.
        caches, names: the attention layers and their names, in order.
        layout: of a sub-block.
        requests: told what was kept.
        ring: the last queries of the prompts.
        build: makes attention metadata of a batch (vLLM's common metadata in).
        rank: names the trace file.
    """

    def __init__(
        self,
        config: UncompConfig,
        schedule: Schedule,
        parts: PrunedModel,
        caches: list[LayerCache],
        names: list[str],
        layout: CacheLayout,
        requests: CompressedRequests,
        ring: QueryRing,
        build: Callable[[Any], Any],
        rank: int = 0,
    ) -> None:
        self.config, self.schedule, self.parts = config, schedule, parts
        self.caches, self.names, self.layout = caches, names, layout
        self.requests, self.ring, self._build = requests, ring, build
        self._trace = Path(config.trace, f"pruned-{rank}.jsonl") if config.trace else None
        self._prompts: list[_Prompt] = []

    @contextmanager
    def step(self, prunings: Sequence[Pruning]) -> Iterator[None]:
        """Everything that the model computes inside is pruned."""
        self._prompts = [_Prompt(order, -1, torch.arange(order.num_tokens)) for order in prunings]
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
        self._common, self._starts = common, common.query_start_loc_cpu.tolist()
        self._index = torch.arange(common.num_actual_tokens)
        for prompt in self._prompts:
            prompt.row = row_of[prompt.order.request_id]
            tokens = self._starts[prompt.row + 1] - self._starts[prompt.row]
            if tokens != prompt.order.num_tokens:
                raise RuntimeError(
                    f"uncomp: {prompt.order.request_id} is to be pruned as a whole, but "
                    f"{tokens} of its {prompt.order.num_tokens} tokens are in this step"
                )

    def finish(self, block_row: Callable[[str], Tensor]) -> list[str]:
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
            self._leave(prompt, len(self.caches))
            name, tokens = prompt.order.request_id, prompt.order.num_tokens
            row = block_row(name)[: tokens // self.requests.block_size]
            self.requests.place_pruned(name, tokens, row, prompt.kept)
            self._write_trace(prompt)
        return [prompt.order.request_id for prompt in done]

    def _hook(self, index: int, layer: nn.Module) -> Callable[..., Any]:
        signature = inspect.signature(layer.forward)

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = signature.bind(*args, **kwargs)
            if index in self.schedule.starts:
                take = self._enter(self.schedule.starts.index(index) + 1)
                for name in _GIVEN[1:]:
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
            chosen[prompt.row] = self._choose(prompt, stage, first - 1)
            prompt.at = prompt.at[chosen[prompt.row]]
        take, slots, starts = [], [], [0]
        for row, (begin, end) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            rows = chosen.get(row, torch.arange(end - begin))
            take.append(begin + rows)
            last = int(self._common.query_start_loc_cpu[row + 1])
            slots.append(torch.arange(last - len(rows), last))
            starts.append(starts[-1] + len(rows))
        taken = torch.cat(take)
        self._index, self._starts = self._index[taken], starts
        slot_mapping = self._common.slot_mapping[torch.cat(slots)]
        metadata = self._build(self._shorter(starts, slot_mapping))
        context: Any = get_forward_context()  # one batch (no dual batch overlap): dictionaries
        later = self.names[first:]
        context.attn_metadata |= dict.fromkeys(later, metadata)
        if context.slot_mapping:  # older vLLM: in the metadata alone
            context.slot_mapping |= dict.fromkeys(later, slot_mapping)
        return taken

    def _shorter(self, starts: list[int], slot_mapping: Tensor) -> Any:
        """vLLM's common metadata of the rows that are left."""
        common, size = self._common, self.requests.block_size
        seq_lens, table = common.seq_lens.clone(), common.block_table_tensor.clone()
        for prompt in self._prompts:
            dropped = (prompt.order.num_tokens - len(prompt.at)) // size
            seq_lens[prompt.row] = len(prompt.at)
            table[prompt.row] = table[prompt.row].roll(-dropped)
        begin = torch.tensor(starts, dtype=common.query_start_loc.dtype)
        return common.replace(
            query_start_loc=begin,
            query_start_loc_cpu=begin,
            seq_lens=seq_lens,
            num_actual_tokens=starts[-1],
            max_query_len=int((begin[1:] - begin[:-1]).max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=table,
            slot_mapping=slot_mapping,
        )

    def _choose(self, prompt: _Prompt, stage: int, layer: int) -> Tensor:
        """[n] int64, indices into the positions that the layer read."""
        order, size = prompt.order, self.requests.block_size
        choice = CHOICES[(order.own or self.config).prefill_scores]
        cache = self.caches[layer]
        total = order.num_tokens
        blocks = self._common.block_table_tensor[prompt.row]
        blocks = blocks[(total - len(prompt.at)) // size : -(-total // size)].long()
        heads = torch.arange(self.requests.heads).unsqueeze(1)
        keys = cache.cache.new_empty(
            self.requests.heads, len(blocks), size, cache.cache.shape[3] // 2
        )
        self.layout.keys(cache.cache, blocks * self.requests.heads + heads, keys)
        queries = self.ring.of_layer(layer, order.request_id, total, choice.queries)
        scores = choice.scores(
            queries.unflatten(1, (self.requests.heads, -1)).permute(1, 2, 0, 3),
            keys.flatten(1, 2)[:, : len(prompt.at)],
            torch.arange(total - len(queries), total),
            prompt.at,
            cache.scale,
            cache.softcap,
        )
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


def _decoder_layer(modules: dict[str, nn.Module], attention: str) -> nn.Module:
    """The element of the model's list of layers that holds an attention module."""
    parts = attention.split(".")
    at = max((i for i, part in enumerate(parts) if part.isdigit()), default=None)
    found = None if at is None else modules.get(".".join(parts[: at + 1]))
    if found is None:
        raise RuntimeError(f"uncomp: no decoder layer was found around {attention}")
    return found
