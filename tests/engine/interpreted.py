"""The path of a GPU on a CPU: the same seat, compactor and kernels, run by Triton's interpreter.

A plain backend in PyTorch stands where FlashAttention stands; everything else is what a GPU runs,
but for CUDA graphs and streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Ask, Engine, running
from reference import Reference
from torch import Tensor
from triton.language.semantic import TritonSemantic
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.cpu_worker import CPUWorker

from uncomp.engine import activate
from uncomp.engine.device_worker import DeviceWorker
from uncomp.engine.sub_block_backend import SubBlockBuilder, SubBlockImpl

# A third of the interpreter's time goes into looking for overflows of 32-bit integers. The tests of
# the kernels do that.
TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None

WORKER = f"{__name__}.InterpretedWorker"
FP8 = torch.float8_e4m3fn
#: smaller in tests: several launches for each compaction
ARENA_BYTES = 3 << 20
ARGUMENTS = {"dtype": "float32", "max_model_len": 512, "kv_cache_memory_bytes": 60_000_000}


class InterpretedBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type:
        return InterpretedImpl

    @staticmethod
    def get_builder_cls() -> type:
        return InterpretedBuilder


class PlainBuilder(CPUAttentionMetadataBuilder):
    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False):
        return common_attn_metadata


class InterpretedBuilder(SubBlockBuilder, PlainBuilder):
    #: as with full CUDA graphs: decode batches are always ours
    full_graphs = True


class PlainImpl(CPUAttentionBackendImpl):
    """Attention over vLLM's paged cache, K then V in a token's row, as FlashAttention stores it."""

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        count = slot_mapping.shape[0]
        block, token = slot_mapping // kv_cache.shape[2], slot_mapping % kv_cache.shape[2]
        tokens = torch.cat([key[:count], value[:count]], -1)
        if kv_cache.dtype.itemsize == 1:
            scale = _scale_row(layer, self.head_size)
            tokens = (tokens / scale).to(FP8).view(kv_cache.dtype)
        kv_cache[block, :, token] = tokens

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
        common = attn_metadata
        if common is None:
            return output.zero_()
        starts, size = common.query_start_loc.tolist(), self.head_size
        for row in range(common.num_reqs):
            first, last, length = starts[row], starts[row + 1], int(common.seq_lens[row])
            blocks = common.block_table_tensor[row, : -(-length // kv_cache.shape[2])].long()
            cached = kv_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length]
            if cached.dtype.itemsize == 1:
                scale = _scale_row(layer, size)
                cached = cached.view(FP8).to(query.dtype) * scale.to(query.dtype)
            mask = torch.arange(length) <= torch.arange(length - last + first, length)[:, None]
            attended = torch.nn.functional.scaled_dot_product_attention(
                query[first:last].view(last - first, -1, size).transpose(0, 1),
                cached[..., :size],
                cached[..., size:],
                attn_mask=mask,
                scale=self.scale,
                enable_gqa=True,
            )
            output[first:last] = attended.transpose(0, 1).reshape(output[first:last].shape)
        return output


def _scale_row(layer: Any, size: int) -> Tensor:
    """K scale, then V scale, of every channel of a token's row."""
    return torch.cat([layer._k_scale.expand(size), layer._v_scale.expand(size)])


class InterpretedImpl(SubBlockImpl, PlainImpl):
    pass


class InterpretedWorker(DeviceWorker, CPUWorker):
    stock_backend = AttentionBackendEnum.CPU_ATTN
    backend = InterpretedBackend

    def _arena_bytes(self) -> int:
        return ARENA_BYTES


def short_model(model: Any, folder: Any, layers: int) -> Any:
    """A checkpoint with the first layers of another one."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    weights: dict[str, Tensor] = {}
    for path in model.iterdir():
        if path.suffix == ".safetensors":
            weights |= load_file(path)
        elif path.name == "config.json":
            config = json.loads(path.read_text())
            config["num_hidden_layers"] = layers
            (folder / path.name).write_text(json.dumps(config))
        elif path.is_file() and "index" not in path.name:
            shutil.copy(path, folder)
    dropped = tuple(f"model.layers.{i}." for i in range(layers, 200))
    kept = {name: t.contiguous() for name, t in weights.items() if not name.startswith(dropped)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@contextmanager
def interpreting(model: Path, settings: dict[str, Any], **arguments: Any) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(activate.WORKERS, "cpu", WORKER)
        with running(model, settings, **{**ARGUMENTS, **arguments}) as engine:
            yield engine


def assert_as_masked_reference(
    engine: Engine, model: Path, asks: list[Ask], least: int, pool: int | None = None
) -> None:
    """Serve; every log-probability as with all but the kept entries masked.

    Args:
        least: compactions.
        pool: blocks to serve from; None: all.
    """
    with engine.pool_of(pool) if pool else nullcontext():
        answers = engine.serve(asks)
    traces = {name: engine.trace(group[0].request_id) for name, group in answers.items()}
    assert engine.leftovers() == {}
    compactions = {name: len(trace) for name, trace in traces.items()}
    assert sum(compactions.values()) >= least, compactions
    reference = Reference(model, torch.float32)
    for name, [answer] in answers.items():
        expected = reference.logprobs(answer.prompt, answer.tokens, traces[name])
        for row, step in zip(expected, answer.logprobs, strict=True):
            for token, logprob in step.items():
                # float32 in another order of sums, as in test_equality.py
                assert logprob == pytest.approx(float(row[token]), abs=5e-4), name


def assert_same_kept(host: list[dict[str, Any]], device: list[dict[str, Any]]) -> None:
    """Records of two traces are of the same compactions, which kept the same entries."""
    same = total = 0
    for left, right in zip(host, device, strict=True):
        for name in ("num_tokens", "generation"):
            assert left[name] == right[name]
        for left_heads, right_heads in zip(left["kept"], right["kept"], strict=True):
            for a, b in zip(left_heads, right_heads, strict=True):
                assert len(a) == len(b)
                same += len(set(a) & set(b))
                total += len(a)
    # Scores are sums in another order: entries may change places where they are equal to 1e-6.
    assert same >= 0.99 * total
