"""How a step is split between our kernel and the stock backend, and what sits on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

from uncomp.engine.cuda_backend import SubBlockFlashBackend, SubBlockFlashBuilder, SubBlockFlashImpl
from uncomp.engine.cuda_worker import CompactingCUDAWorker
from uncomp.engine.sub_block_backend import SubBlockBuilder, SubBlockImpl, SubBlockMetadata
from uncomp.engine.worker_base import CompactingWorker


def common_of(query_lens: list[int], seq_lens: list[int], padding: int = 0) -> Any:
    """vLLM's metadata; `padding` more rows without tokens, as in a padded graph."""
    rows = len(query_lens) + padding
    starts = torch.zeros(rows + 1, dtype=torch.int32)
    starts[1:] = torch.tensor(query_lens + [0] * padding).cumsum(0)
    tokens = int(starts[-1]) + padding
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=torch.tensor(seq_lens + [0] * padding, dtype=torch.int32),
        num_reqs=rows,
        num_actual_tokens=tokens,
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        block_table_tensor=torch.arange(rows * 4, dtype=torch.int32).view(rows, 4),
        slot_mapping=torch.arange(tokens),
    )


class Stock:
    """In the place of a vLLM builder: remembers what it was asked to build."""

    def build(self, common_prefix_len: int, common: Any, fast_build: bool = False) -> Any:
        return SimpleNamespace(prefix=common_prefix_len, common=common)


class Seat:
    def __init__(self, compressed: bool) -> None:
        self.compressed = compressed

    def batch(self, common: Any) -> None:
        self.noted = common

    def any_compressed(self) -> bool:
        return self.compressed

    def decode_rows(self, common: Any, rows: int, tokens: int) -> tuple[int, int]:
        return rows, tokens

    def prefill_record(self, common: Any, first_row: int) -> str:
        return f"from row {first_row}"


class Builder(SubBlockBuilder, Stock):
    pass


def build(common: Any, compressed: bool, full_graphs: bool) -> Any:
    builder: Any = Builder()
    builder.seat, builder.full_graphs = Seat(compressed), full_graphs
    return builder.build(0, common)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(
    ("compressed", "full_graphs", "ours"),
    [(True, True, True), (True, False, True), (False, True, True), (False, False, False)],
)
def test_single_tokens(compressed: bool, full_graphs: bool, ours: bool, padding: int) -> None:
    common = common_of([1, 1, 1], [9, 50, 7], padding)
    meta = build(common, compressed, full_graphs)
    assert isinstance(meta, SubBlockMetadata)
    if ours:
        # The whole padded batch: a captured graph has launches for all of its rows.
        assert meta.decode == (3 + padding, 3 + padding)
        assert meta.stock is None
    else:
        assert meta.decode is None
        assert meta.stock.common is common


@pytest.mark.parametrize("full_graphs", [True, False])
def test_mixed_without_compressed_rows_is_stock(full_graphs: bool) -> None:
    common = common_of([1, 1, 20], [9, 50, 20])
    meta = build(common, False, full_graphs)
    assert meta.decode is None
    assert meta.stock.common is common
    assert meta.record == "from row 0"


def test_mixed_is_split() -> None:
    common = common_of([1, 1, 20, 5], [9, 50, 20, 64])
    meta = build(common, True, True)
    assert meta.decode == (2, 2)
    assert meta.first_token == 2
    assert meta.record == "from row 2"
    rest = meta.stock.common
    assert meta.stock.prefix == 0
    assert rest.query_start_loc.tolist() == rest.query_start_loc_cpu.tolist() == [0, 20, 25]
    assert rest.seq_lens.tolist() == [20, 64]
    assert (rest.num_reqs, rest.num_actual_tokens, rest.max_query_len) == (2, 25, 20)
    assert rest.block_table_tensor.tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert rest.slot_mapping.tolist() == list(range(2, 27))


@pytest.mark.parametrize("compressed", [True, False])
def test_later_layers_of_pruned_prompts_keep_the_decode_rows(compressed: bool) -> None:
    common = common_of([1, 1, 20, 5], [9, 50, 20, 64])
    builder: Any = Builder()
    builder.seat = Seat(compressed)
    before = builder.build(0, common)
    assert builder.seat.noted is common
    if compressed:
        rows = SimpleNamespace(lengths=common.seq_lens[:2])
        before.decode = SimpleNamespace(rows=rows)
    shorter = common_of([1, 1, 12, 5], [9, 50, 12, 64])
    meta = builder.build_shorter(shorter, before)
    first = 2 if compressed else 0
    assert (meta.decode, meta.first_token) == (before.decode, first)
    assert meta.num_actual_tokens == 19
    assert meta.record == f"from row {first}"
    starts = [0, 12, 17] if compressed else [0, 1, 2, 14, 19]
    assert meta.stock.common.query_start_loc.tolist() == starts


def test_prefill_alone_beside_nothing() -> None:
    meta = build(common_of([20], [20]), True, True)
    assert meta.decode is None
    assert meta.first_token == 0
    assert meta.stock.common.num_reqs == 1


def test_without_seat_it_is_the_stock_builder() -> None:
    common = common_of([1], [4])
    assert Builder().build(3, common).common is common


def test_what_sits_on_a_gpu() -> None:
    assert issubclass(CompactingCUDAWorker, CompactingWorker)
    assert CompactingCUDAWorker.stock_backend.name == "FLASH_ATTN"
    assert SubBlockFlashBackend.get_name() == "FLASH_ATTN"
    assert CompactingCUDAWorker.backend.get_impl_cls() is SubBlockFlashImpl
    assert SubBlockFlashImpl.forward is SubBlockImpl.forward
    builder = SubBlockFlashBackend.get_builder_cls()
    assert builder is SubBlockFlashBuilder
    assert issubclass(builder, FlashAttentionMetadataBuilder)
    # Rows of one token first, and full graphs for them alone.
    assert builder.reorder_batch_threshold == 1
    support = builder.get_cudagraph_support(None, None)
    assert support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
