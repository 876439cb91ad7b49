"""vLLM's CPU attention backend, extended by rows whose heads have unequal lengths.

A compressed row is attended to as one sequence per KV head: the kernel sees ``rows * heads``
sequences with a single KV head each, over the cache viewed as sub-blocks. Everything else (prefill,
uncompressed rows, cache writes) is vLLM's own code on vLLM's own metadata; a batch without
compressed rows runs exactly what the unmodified engine runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs as vllm_envs
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

if TYPE_CHECKING:
    from uncomp.engine.seat import Seat

# vLLM 0.26 plans the kernel's work without the cache's dtype.
PLAN_TAKES_DTYPE = "kv_cache_dtype" in signature(ops.cpu_attn_get_scheduler_metadata).parameters


@dataclass
class CompressedRows:
    """Attention inputs of the compressed rows, one sequence per (row, KV head).

    Attributes:
        order: [queries] int64, the sequences' queries in the batch seen as [tokens * KV heads];
            ``None`` = all of it, as it is: no other rows, and one token each.
        starts: [sequences + 1] int32, where the queries of a sequence begin.
        lengths: [layers, sequences] int32.
        tables: [layers, sequences, width] int32, sub-block numbers.
        schedules: per layer, the kernel's own work plan.
    """

    order: Tensor | None
    starts: Tensor
    lengths: Tensor
    tables: Tensor
    schedules: list[Tensor]


@dataclass
class SeatedMetadata(CPUAttentionMetadata):
    """vLLM's metadata with what compression adds to one step.

    Attributes:
        seat: this worker's state.
        record: (source [n], destination [n]) int64: queries to remember.
        compressed: the compressed rows, or ``None``.
        plain: vLLM's metadata of the other rows when there are both kinds.
        plain_tokens: [n] int64, their tokens in the batch.
    """

    seat: Seat | None = None
    record: tuple[Tensor, Tensor] | None = None
    compressed: CompressedRows | None = None
    plain: CPUAttentionMetadata | None = None
    plain_tokens: Tensor | None = None


class SeatedBackend(CPUAttentionBackend):
    """CPU_ATTN with compressed rows."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return SeatedImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return SeatedBuilder


class SeatedBuilder(CPUAttentionMetadataBuilder):
    """Builds metadata; the worker gives it its seat once the KV cache exists."""

    seat: Seat | None = None

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        common = common_attn_metadata
        if self.seat is not None:
            self.seat.batch(common)
        return self.metadata(common, common_prefix_len, fast_build)

    def metadata(
        self, common: Any, common_prefix_len: int = 0, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        """Of a batch, or of what is left of it in later layers."""
        step = self.seat.step_rows(common) if self.seat is not None else None
        if step is None:
            return super().build(common_prefix_len, common, fast_build)
        assert self.seat is not None
        if not step.compressed:
            stock = super().build(common_prefix_len, common, fast_build)
            return SeatedMetadata(**vars(stock), seat=self.seat, record=step.record)
        compressed = self._compressed_rows(step, common)
        plain = plain_tokens = None
        if step.plain_rows.numel():
            subset, plain_tokens = _select_rows(common, step.plain_rows)
            plain = super().build(common_prefix_len, subset, fast_build)
        return SeatedMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
            seat=self.seat,
            record=step.record,
            compressed=compressed,
            plain=plain,
            plain_tokens=plain_tokens,
        )

    def _compressed_rows(self, step: Any, common: Any) -> CompressedRows:
        assert self.seat is not None
        batch = self.seat.requests.batch(step.slots, common.seq_lens[step.compressed_rows])
        heads = self.num_kv_heads
        first = common.query_start_loc[step.compressed_rows].long()
        counts = common.query_start_loc[step.compressed_rows + 1].long() - first
        starts = torch.zeros(batch.lengths.shape[1] + 1, dtype=torch.int32)
        starts[1:] = counts.repeat_interleave(heads).cumsum(0)
        plan_of: dict[bytes, Tensor] = {}
        schedules = []
        for lengths in batch.lengths:
            # Layers with the same lengths (uniform policies: all of them) share a work plan.
            key = lengths.numpy().tobytes()
            if key not in plan_of:
                plan_of[key] = self._schedule(lengths, starts)
            schedules.append(plan_of[key])
        order = None
        if step.plain_rows.numel() or int(counts.max()) > 1:
            order = _by_sequence(first, counts, heads)
        return CompressedRows(order, starts, batch.lengths, batch.tables, schedules)

    def _schedule(self, lengths: Tensor, starts: Tensor) -> Tensor:
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=lengths.shape[0],
            num_heads=self.num_heads // self.num_kv_heads,
            num_kv_heads=1,
            head_dim=self.head_dim,
            seq_lens=lengths,
            dtype=cast(torch.dtype, self.dtype),
            query_start_loc=starts,
            causal=True,
            sliding_window_size=self.window_size,
            isa=self.isa,
            enable_kv_split=vllm_envs.VLLM_CPU_ATTN_SPLIT_KV,
            dynamic_causal=None,
            **({"kv_cache_dtype": self.kv_cache_dtype} if PLAN_TAKES_DTYPE else {}),
        )


class SeatedImpl(CPUAttentionBackendImpl):
    """Attention of one layer; ``layer_index`` is set by the worker."""

    layer_index: int = -1
    _sub_blocks: tuple[Tensor, Tensor]

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        meta = attn_metadata
        rest = (output_scale, output_block_scale)
        if not isinstance(meta, SeatedMetadata):
            return super().forward(layer, query, key, value, kv_cache, meta, output, *rest)
        if meta.record is not None:
            assert meta.seat is not None
            source, destination = meta.record
            meta.seat.queries[self.layer_index][destination] = query[source]
        if meta.compressed is None:
            return super().forward(layer, query, key, value, kv_cache, meta, output, *rest)
        count = meta.num_actual_tokens
        self._attend(meta.compressed, query[:count], output[:count])
        if meta.plain is None:
            return output
        others = torch.empty_like(output[: meta.plain.num_actual_tokens])
        super().forward(
            layer, query[meta.plain_tokens], key, value, kv_cache, meta.plain, others, *rest
        )
        output[meta.plain_tokens] = others
        return output

    def hold(self, cache: Tensor) -> None:
        """Take note of the cache that the numbers of sub-blocks are places in.

        Args:
            cache: [num_blocks, heads, block_size, 2 * head_size], see `LayerCache`.
        """
        blocks, heads, block_size, _ = cache.shape
        flat = cache.view(blocks * heads, 1, block_size * 2, -1)
        keys, values = flat.chunk(2, dim=2)
        self._sub_blocks = keys, values

    def _attend(self, rows: CompressedRows, query: Tensor, output: Tensor) -> None:
        """query, output: [tokens, num_heads, head_size] (output contiguous)."""
        shape = (-1, self.num_queries_per_kv, self.head_size)
        queries, attended = query.reshape(shape), output.view(shape)
        if rows.order is not None:
            queries = queries[rows.order]
            attended = torch.empty_like(queries)
        key_cache, value_cache = self._sub_blocks
        ops.cpu_attention_with_kv_cache(
            query=queries,
            key_cache=key_cache,
            value_cache=value_cache,
            output=attended,
            query_start_loc=rows.starts,
            seq_lens=rows.lengths[self.layer_index],
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=self.sliding_window,
            block_table=rows.tables[self.layer_index],
            softcap=self.logits_soft_cap,
            scheduler_metadata=rows.schedules[self.layer_index],
            s_aux=None,
            dynamic_causal=None,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        if rows.order is not None:
            output.view(shape)[rows.order] = attended


def _by_sequence(first: Tensor, counts: Tensor, heads: int) -> Tensor:
    """Queries of rows, sequence by sequence (row, then KV head, then token), each as
    ``token * heads + head``.

    Args:
        first, counts: [rows] int64, a row's first token in the batch, and how many it has.
    """
    of_row = counts * heads  # queries
    row = torch.arange(len(counts)).repeat_interleave(of_row)
    place = torch.arange(int(of_row.sum())) - (of_row.cumsum(0) - of_row)[row]
    return (first[row] + place % counts[row]) * heads + place // counts[row]


def _select_rows(common: Any, rows: Tensor) -> tuple[Any, Tensor]:
    """vLLM's common metadata of some rows of a batch, and their tokens' indices in the batch."""
    starts = common.query_start_loc.long()
    counts = (starts[1:] - starts[:-1])[rows]
    new_starts = torch.zeros(rows.shape[0] + 1, dtype=common.query_start_loc.dtype)
    new_starts[1:] = counts.cumsum(0)
    offsets = starts[rows] - new_starts[:-1].long()
    tokens = torch.arange(int(counts.sum())) + offsets.repeat_interleave(counts)
    seq_lens = common.seq_lens[rows]
    subset = common.replace(
        query_start_loc=new_starts,
        query_start_loc_cpu=new_starts,
        seq_lens=seq_lens,
        num_reqs=rows.shape[0],
        num_actual_tokens=tokens.shape[0],
        max_query_len=int(counts.max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=common.block_table_tensor[rows],
        slot_mapping=common.slot_mapping[tokens],
    )
    return subset, tokens
