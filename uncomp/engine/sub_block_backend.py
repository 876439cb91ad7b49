"""Attention for any device with Triton: decode rows by our kernel, the rest by the stock backend.

Two mixins, put before the builder and the implementation of a stock vLLM backend
(`cuda_backend.py`). The batch is ordered decodes first, so a step is split at one row: rows in
front of it have one token and are attended to over sub-blocks, compressed or not; rows behind it
are prefill chunks and go to the stock backend with metadata of their own.

Which path a step takes must not depend on what is compressed where a full CUDA graph may replay
it: a graph holds the launches of its capture, and its decode rows are always ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from uncomp.engine.device_seat import DecodeRows, DeviceSeat

    _Builder = Any
    _Impl = Any
else:
    _Builder = _Impl = object


@dataclass
class SubBlockMetadata:
    """One step.

    Attributes:
        num_actual_tokens: tokens of the batch.
        seat: this worker's state.
        decode: rows for our kernel, or None.
        stock: the stock backend's metadata of the other rows, or None.
        first_token: first token of those rows.
        record: (token [n], address [n]) queries to remember of prefill rows, or None.
    """

    num_actual_tokens: int
    seat: DeviceSeat
    decode: DecodeRows | None = None
    stock: Any = None
    first_token: int = 0
    record: tuple[Tensor, Tensor] | None = None

    @property
    def decode_count(self) -> int:
        """Rows for our kernel."""
        return 0 if self.decode is None else self.decode.rows.lengths.shape[0]


class SubBlockBuilder(_Builder):
    """Splits a batch; the worker gives it its seat once the KV cache exists.

    Attributes:
        full_graphs: whether decode batches may be replayed from full CUDA graphs.
    """

    reorder_batch_threshold: int | None = 1
    supports_update_block_table = False
    seat: DeviceSeat | None = None
    full_graphs: bool = False

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        common, seat = common_attn_metadata, self.seat
        if seat is None:
            return super().build(common_prefix_len, common, fast_build)
        seat.batch(common)
        rows, tokens = _leading_decodes(common)
        mixed = rows < common.num_reqs
        if not seat.any_compressed() and (mixed or not self.full_graphs):
            record = seat.prefill_record(common, 0)
            stock = super().build(common_prefix_len, common, fast_build)
            return SubBlockMetadata(common.num_actual_tokens, seat, stock=stock, record=record)
        meta = SubBlockMetadata(common.num_actual_tokens, seat, first_token=tokens)
        if mixed:
            meta.record = seat.prefill_record(common, rows)
            meta.stock = super().build(0, _rows_from(common, rows, tokens), fast_build)
        if rows:
            meta.decode = seat.decode_rows(common, rows, tokens)
        return meta

    def build_shorter(self, common: Any, before: SubBlockMetadata) -> SubBlockMetadata:
        """Metadata of what is left of a batch in later layers, where prompts are pruned.

        Args:
            common: of the rows that are left; rows of one token are as they were.
            before: metadata of the layer before.
        """
        seat, rows = before.seat, before.decode_count
        return SubBlockMetadata(
            common.num_actual_tokens,
            seat,
            before.decode,
            super().build(0, _rows_from(common, rows, before.first_token)),
            before.first_token,
            seat.prefill_record(common, rows),
        )


class SubBlockImpl(_Impl):
    """Attention of one layer; `layer_index` is set by the worker."""

    layer_index: int = -1

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        meta = attn_metadata
        rest = (output_scale, output_block_scale)
        if not isinstance(meta, SubBlockMetadata):
            return super().forward(layer, query, key, value, kv_cache, meta, output, *rest)
        first = meta.first_token
        if meta.stock is not None:
            part = query[first:], key[first:], value[first:]
            super().forward(layer, *part, kv_cache, meta.stock, output[first:], *rest)
        if meta.record is not None:
            meta.seat.remember(
                self.layer_index, self._plain_query(layer, query, output.dtype), meta.record
            )
        if meta.decode is not None:
            meta.seat.attend(
                self.layer_index,
                self._plain_query(layer, query[:first], output.dtype),
                output[:first].view(first, self.num_heads, self.head_size),
                meta.decode,
                self.scale,
                float(self.logits_soft_cap or 0.0),
            )
        return output

    def _plain_query(self, layer: Any, query: Tensor, dtype: torch.dtype) -> Tensor:
        """[tokens, heads, head size]; scaled back if vLLM quantised it for an FP8 cache."""
        query = query.view(query.shape[0], self.num_heads, self.head_size)
        if query.dtype.itemsize == 1:
            return query.to(dtype) * layer._q_scale.to(dtype)
        return query


def _leading_decodes(common: Any) -> tuple[int, int]:
    """Rows in front of the first one with several tokens, and their tokens (host numbers)."""
    if common.max_query_len <= 1:
        return common.num_reqs, common.num_actual_tokens
    starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
    for row in range(common.num_reqs):
        if starts[row + 1] - starts[row] > 1:
            return row, starts[row]
    return common.num_reqs, common.num_actual_tokens


def _rows_from(common: Any, row: int, token: int) -> Any:
    """vLLM's common metadata of the rows from `row` on."""
    if row == 0:
        return common
    changed = {
        "query_start_loc": common.query_start_loc[row:] - token,
        "query_start_loc_cpu": common.query_start_loc_cpu[row:] - token,
        "seq_lens": common.seq_lens[row:],
        "num_reqs": common.num_reqs - row,
        "num_actual_tokens": common.num_actual_tokens - token,
        "block_table_tensor": common.block_table_tensor[row:],
        "slot_mapping": common.slot_mapping[token:],
    }
    for name in ("seq_lens_cpu_upper_bound", "is_prefilling"):
        if getattr(common, name, None) is not None:
            changed[name] = getattr(common, name)[row:]
    if getattr(common, "positions", None) is not None:
        changed["positions"] = common.positions[token:]
    return common.replace(**changed)
