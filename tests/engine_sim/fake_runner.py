"""A model runner without a model, under uncomp's real worker class.

Every token writes a number that says what it is into the KV cache, through the block row the worker
was sent, and every row reads everything it should attend to and compares. Uncompressed rows write
a number for their token prefix, which any request with the same prefix may read; rows that were
compacted write numbers of their own, because their keys are no function of the prefix.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from uncomp import budget
from uncomp.config import UncompConfig
from uncomp.engine.orders import Order, StepPlan
from uncomp.engine.seat import Seat
from uncomp.policies import LayerView, Policy
from uncomp.spans import SENTENCE

NO_BLOCK = 10**6  # beyond the pool: reading it is an IndexError


@dataclass(frozen=True)
class Shape:
    """Of the cache: every layer is [blocks, heads, block_size, 2] float64 with a head size of 1;
    a sub-block holds its keys, then its values."""

    blocks: int
    block_size: int = 4
    layers: int = 2
    heads: int = 3
    group: int = 2  # query heads per KV head


class Prefixes:
    """Numbers token prefixes: equal prefixes get equal numbers, everything else its own."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}
        self._last = 0

    def own(self) -> int:
        self._last += 1
        return self._last

    def of(self, tokens: list[int]) -> list[int]:
        """The number of every prefix ``tokens[: i + 1]``."""
        numbers, number = [], 0
        for token in tokens:
            key = (number, token)
            if key not in self._numbers:
                self._numbers[key] = self.own()
            number = self._numbers[key]
            numbers.append(number)
        return numbers


@dataclass
class Resident:
    """What the worker knows of a request, and what its cache must hold.

    Attributes:
        tokens: prompt and sampled tokens.
        blocks: the block row as the worker sees it: append-only.
        content: number written at every computed position.
        kept: positions kept by the last compaction, [layer][head]; ``None`` = never compacted.
        full: tokens in full blocks at the last compaction.
    """

    tokens: list[int]
    blocks: list[int]
    content: list[int]
    kept: list[list[list[int]]] | None = None
    full: int = 0

    def held(self, layer: int, head: int) -> list[int]:
        """Positions that a head can attend to, in cache order."""
        kept = self.kept[layer][head] if self.kept else []
        return kept + list(range(self.full, len(self.content)))


class RandomPolicy(Policy):
    """Random scores and shares; checks that it sees the right keys and queries."""

    name = "simulated"

    def __init__(self, needs_queries: bool, seed: int) -> None:
        self.needs_queries = needs_queries  # type: ignore[misc]
        self._random = torch.Generator().manual_seed(seed)

    def score(self, view: LayerView) -> Tensor:
        assert bool((view.keys[..., 0] == view.keys[..., 0])[view.valid()].all())
        if self.needs_queries:
            assert view.queries is not None
            assert view.query_positions is not None
            for j, position in enumerate(view.query_positions.tolist()):
                at = (view.positions == position) & view.valid()
                assert bool((at.sum(1) == 1).all()), "a window token is not in the cache"
                own = view.keys[..., 0][at]
                assert bool((view.queries[:, :, j, 0] == own[:, None]).all()), (
                    f"the query remembered for position {position} is not its own"
                )
        return torch.rand(view.positions.shape, generator=self._random, dtype=torch.float64)

    def deal(
        self,
        view: LayerView,
        pooled: Tensor,
        eligible: Tensor,
        total: int,
        minimum: Tensor,
        maximum: Tensor,
        block_size: int,
    ) -> Tensor:
        weights = torch.rand(len(view.lengths), generator=self._random, dtype=torch.float64) ** 3
        return budget.deal(weights, total, minimum, maximum)


@dataclass
class FakeRunner:
    """Stands where vLLM's model runner stands; see the module's docstring."""

    shape: Shape
    config: UncompConfig
    vocabulary: int
    random: random.Random
    prefixes: Prefixes = field(default_factory=Prefixes)

    def __post_init__(self) -> None:
        s = self.shape
        self.seat: Seat | None = None
        self.caches = [
            torch.full((s.blocks, s.heads, s.block_size, 2), float("nan"), dtype=torch.float64)
            for _ in range(s.layers)
        ]
        #: the same memory, [blocks, heads, K or V, block_size]
        self.halves = [c.view(s.blocks, s.heads, 2, s.block_size) for c in self.caches]
        self.residents: dict[str, Resident] = {}
        self.input_batch = SimpleNamespace(req_ids=[], req_id_to_index={}, block_table=[])
        self._sampled: ModelRunnerOutput | None = None

    def execute_model(self, output: Any) -> Any:
        self._update_states(output)
        self._sampled = None
        if output.total_num_scheduled_tokens == 0:
            return EMPTY_MODEL_RUNNER_OUTPUT
        counts = self._make_batch(output)
        rows = [self.residents[i] for i in self.input_batch.req_ids]
        ends = [len(r.content) + n for r, n in zip(rows, counts, strict=True)]
        starts = np.concatenate([[0], np.cumsum(counts)])
        common = SimpleNamespace(
            num_reqs=len(rows),
            query_start_loc_cpu=torch.from_numpy(starts).int(),
            seq_lens=torch.tensor(ends, dtype=torch.int32),
            block_table_tensor=torch.from_numpy(self._table()),
        )
        assert self.seat is not None
        step = self.seat.step_rows(common)
        slots = step.slots if step is not None else []
        compressed = step.compressed_rows if step is not None else torch.zeros(0).long()
        batch = self.seat.requests.batch(slots, common.seq_lens[compressed]) if slots else None
        written = torch.cat([self._write(r, n) for r, n in zip(rows, counts, strict=True)])
        if step is not None and step.record is not None:
            source, destination = step.record
            heads = written[source].repeat_interleave(self.shape.group, dim=2)
            for layer in range(self.shape.layers):
                self.seat.queries[layer][destination] = heads[:, layer].unsqueeze(-1)
        which = {row: i for i, row in enumerate(compressed.tolist())}
        for row, (request_id, resident) in enumerate(
            zip(self.input_batch.req_ids, rows, strict=True)
        ):
            assert (row in which) == (resident.kept is not None), request_id
            if row not in which:
                self._read_plain(request_id, resident)
                continue
            assert batch is not None
            at = slice(which[row] * self.shape.heads, (which[row] + 1) * self.shape.heads)
            self._read_heads(request_id, resident, batch.tables[:, at], batch.lengths[:, at])
        self._sampled = self._sample(rows)
        return None

    def sample_tokens(self, grammar_output: Any = None) -> Any:
        return self._sampled

    def check_orders(self, plan: StepPlan) -> None:
        """After the orders of a step: the right positions were kept, and they are where they
        should be."""
        for order in plan.orders:
            self._check_order(order)

    def tags(self, content: Tensor) -> Tensor:
        """Numbers [n] -> what each layer and head stores of them, [n, layers, heads]."""
        s = self.shape
        layer = torch.arange(s.layers).unsqueeze(1)
        head = torch.arange(s.heads)
        return ((content[:, None, None] * s.layers + layer) * s.heads + head).double()

    def _update_states(self, output: Any) -> None:
        for request_id in output.finished_req_ids:
            self.residents.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            assert new.req_id not in self.residents
            tokens = list(new.prompt_token_ids)
            content = self.prefixes.of(tokens)[: new.num_computed_tokens]
            self.residents[new.req_id] = Resident(tokens, list(new.block_ids[0]), content)
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            computed, blocks = cached.num_computed_tokens[i], cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                tokens = list(cached.all_token_ids[request_id])
                content = self.prefixes.of(tokens)[:computed]
                self.residents[request_id] = Resident(tokens, list(blocks[0]), content)
                continue
            resident = self.residents[request_id]
            resident.blocks.extend(blocks[0] if blocks is not None else ())
            assert len(resident.content) == computed, request_id

    def _make_batch(self, output: Any) -> list[int]:
        scheduled = output.num_scheduled_tokens
        before = [i for i in self.input_batch.req_ids if i in scheduled]
        ids = before + [i for i in scheduled if i not in before]
        if self.random.random() < 0.2:
            self.random.shuffle(ids)
        self.input_batch.req_ids = ids
        self.input_batch.req_id_to_index = {request_id: i for i, request_id in enumerate(ids)}
        table = SimpleNamespace(block_table=SimpleNamespace(np=self._table()))
        self.input_batch.block_table = [table]
        return [scheduled[i] for i in ids]

    def _table(self) -> np.ndarray:
        rows = [self.residents[i].blocks for i in self.input_batch.req_ids]
        table = np.full((len(rows), max(map(len, rows)) + 2), NO_BLOCK, dtype=np.int32)
        for i, row in enumerate(rows):
            table[i, : len(row)] = row
        return table

    def _write(self, resident: Resident, count: int) -> Tensor:
        """Compute ``count`` tokens; returns their tags [count, layers, heads]."""
        first = len(resident.content)
        if resident.kept is None:
            numbers = self.prefixes.of(resident.tokens[: first + count])[first:]
        else:
            numbers = [self.prefixes.own() for _ in range(count)]
        assert len(numbers) == count, "scheduled beyond the tokens that exist"
        resident.content += numbers
        tags = self.tags(torch.tensor(numbers))
        position = torch.arange(first, first + count)
        block = torch.tensor(resident.blocks)[position // self.shape.block_size]
        for layer, halves in enumerate(self.halves):
            both = torch.stack([tags[:, layer], -tags[:, layer]], dim=-1)
            halves[block, :, :, position % self.shape.block_size] = both
        return tags

    def _read_plain(self, request_id: str, resident: Resident) -> None:
        position = torch.arange(len(resident.content))
        block = torch.tensor(resident.blocks)[position // self.shape.block_size]
        wanted = self.tags(torch.tensor(resident.content))
        for layer, halves in enumerate(self.halves):
            got = halves[block, :, :, position % self.shape.block_size]
            self._compare(request_id, layer, got[..., 0], wanted[:, layer])
            self._compare(request_id, layer, got[..., 1], -wanted[:, layer])

    def _read_heads(
        self,
        request_id: str,
        resident: Resident,
        tables: Tensor,
        lengths: Tensor,
        end: int | None = None,
    ) -> None:
        """tables [layers, heads, width], lengths [layers, heads]; positions up to ``end``."""
        s = self.shape
        wanted = self.tags(torch.tensor(resident.content))
        for layer, halves in enumerate(self.halves):
            sub_blocks = halves.flatten(0, 1).transpose(1, 2)  # [.., block_size, K or V]
            for head in range(s.heads):
                length = int(lengths[layer, head])
                table = tables[layer, head, : -(-length // s.block_size)].long()
                got = sub_blocks[table].flatten(0, 1)[:length]
                held = [p for p in resident.held(layer, head) if end is None or p < end]
                assert length == len(held), (request_id, layer, head)
                self._compare(request_id, layer, got[:, 0], wanted[held, layer, head])
                self._compare(request_id, layer, got[:, 1], -wanted[held, layer, head])

    @staticmethod
    def _compare(request_id: str, layer: int, got: Tensor, wanted: Tensor) -> None:
        assert torch.equal(got, wanted), (
            f"{request_id} reads foreign content in layer {layer} at entries "
            f"{(got != wanted).nonzero()[:8].tolist()}"
        )

    def _check_order(self, order: Order) -> None:
        assert self.seat is not None
        s, request_id = self.shape, order.request_id
        resident, slot = self.residents[request_id], self.seat.requests.slots[request_id]
        full = order.full_blocks * s.block_size
        assert order.num_tokens == len(resident.content)
        assert (slot.generation, slot.full_blocks) == (order.generation, order.full_blocks)
        kept = self.seat.requests.kept_positions(slot)
        for layer in range(s.layers):
            dealt = most = 0
            for head in range(s.heads):
                held = [p for p in resident.held(layer, head) if p < full]
                now = kept[layer][head]
                assert now == sorted(set(now))
                assert set(now) <= set(held)
                forced = [p for p in range(full) if self._forced(order, p)]
                assert set(forced) <= set(now), (request_id, layer, head)
                dealt += len(now) // s.block_size
                most += len(held) // s.block_size
            assert dealt == min(most, len(order.kept_blocks) * s.heads)
        resident.kept, resident.full = kept, full
        # The tail enters the tables with the request's next step.
        entries = [self.seat.requests.entries(slot, layer, full) for layer in range(s.layers)]
        for (_, lengths, positions), layer_kept in zip(entries, kept, strict=True):
            said = [p[:n].tolist() for p, n in zip(positions, lengths.tolist(), strict=True)]
            assert said == layer_kept
        tables, lengths = _stack([e[0] for e in entries]), torch.stack([e[1] for e in entries])
        self._read_heads(request_id, resident, tables, lengths, full)

    def _forced(self, order: Order, position: int) -> bool:
        config = order.own or self.config
        return (
            position < config.sinks
            or position >= order.num_tokens - config.window
            or any(start <= position < end for start, end in order.protect)
        )

    def _sample(self, rows: list[Resident]) -> ModelRunnerOutput:
        sampled: list[list[int]] = []
        for request_id, resident in zip(self.input_batch.req_ids, rows, strict=True):
            if len(resident.content) < len(resident.tokens):
                sampled.append([])  # a chunk of the prompt
                continue
            # Deterministic for uncompressed rows, so that equal prompts share what they generate.
            source = f"{resident.content[-1]}" if resident.kept is None else request_id
            token = zlib.crc32(f"{source} {len(resident.tokens)}".encode()) % self.vocabulary
            resident.tokens.append(token)
            sampled.append([token])
        ids = list(self.input_batch.req_ids)
        return ModelRunnerOutput(ids, {r: i for i, r in enumerate(ids)}, sampled)


def _stack(tables: list[Tensor]) -> Tensor:
    width = max(t.shape[-1] for t in tables)
    return torch.stack([torch.nn.functional.pad(t, (0, width - t.shape[-1])) for t in tables])


def token_gaps(ids: Sequence[int]) -> np.ndarray:
    """Every token that is a multiple of 7 begins a sentence, other even ones a word."""
    tokens = np.asarray(ids)
    return np.where(tokens % 7 == 0, SENTENCE, tokens % 2 == 0).astype(np.uint8)
