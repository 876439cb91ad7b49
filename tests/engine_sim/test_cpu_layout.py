"""The layout of vLLM's CPU cache is asked for, not assumed."""

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from uncomp.engine import cpu_layout
from uncomp.engine.cpu_backend import _by_sequence
from uncomp.engine.cpu_layout import CacheLayout, HalfLayout, probe_layout

SHAPES = [
    (32, 64, torch.bfloat16),
    (32, 128, torch.bfloat16),
    (64, 96, torch.bfloat16),
    (128, 64, torch.bfloat16),
    (32, 256, torch.bfloat16),
    (32, 64, torch.float32),
    (128, 128, torch.float32),
    (32, 64, torch.float16),
    (16, 64, torch.bfloat16),
    (16, 64, torch.float32),
    (32, 80, torch.bfloat16),
]


def _keys(layout: CacheLayout, cache: torch.Tensor, sub_blocks: torch.Tensor) -> torch.Tensor:
    block_size, width = cache.shape[2:]
    out = torch.full((*sub_blocks.shape, block_size, width // 2), float("nan"), dtype=cache.dtype)
    layout.keys(cache, sub_blocks, out)
    return out


@pytest.mark.parametrize(("block_size", "head_size", "dtype"), SHAPES, ids=str)
def test_probed_layout_reads_what_vllm_wrote(
    block_size: int, head_size: int, dtype: torch.dtype
) -> None:
    isa = _get_attn_isa(dtype, block_size, head_size)
    layout = probe_layout(block_size, head_size, dtype, isa)
    blocks, heads = 4, 2
    cache = torch.full((blocks, heads, block_size, 2 * head_size), float("nan"), dtype=dtype)
    halves = cache.view(blocks, heads, block_size * 2, head_size).chunk(2, dim=2)
    keys, values = torch.randn(2, 2 * block_size, heads, head_size).to(dtype)
    slots = torch.randperm(3 * block_size)[: 2 * block_size] + block_size
    ops.cpu_attn_reshape_and_cache(
        keys, values, *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    for head in range(heads):
        sub_blocks = slots // block_size * heads + head
        read = _keys(layout, cache, sub_blocks)[torch.arange(len(slots)), slots % block_size]
        assert torch.equal(read, keys[:, head])
        single = layout.at(cache, sub_blocks, slots % block_size)
        assert torch.equal(single[0], keys[:, head])
        assert torch.equal(single[1], values[:, head])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "transposed", "tiled", "tiled-values", "permuted"])
def test_what_is_written_is_read_back(kind: str, dtype: torch.dtype) -> None:
    size, dim = 4, 6
    order = torch.arange(size * dim)
    offsets = {
        "plain": order.view(size, dim),
        "transposed": order.view(dim, size).T,
        # AMX's keys: tiles of tokens, in them pairs of channels, in them tokens
        "tiled": order.view(2, dim // 2, 2, 2).permute(0, 2, 1, 3).reshape(size, dim),
        # AMX's values: tiles of channels, in them pairs of tokens, in them channels
        "tiled-values": order.view(2, 2, dim // 2, 2).permute(1, 3, 0, 2).reshape(size, dim),
        "permuted": torch.randperm(size * dim).view(size, dim),
    }
    half = HalfLayout.of(offsets[kind])
    assert half.kind == kind.removesuffix("-values")
    layout = CacheLayout(half, half)
    cache = torch.full((5, 2, size, 2 * dim), float("nan"), dtype=dtype)
    keys, values = torch.randn(2, 3, size, dim).to(dtype)
    sub_blocks = torch.tensor([7, 2, 9])
    layout.write(cache, sub_blocks, keys, values)
    assert torch.equal(_keys(layout, cache, sub_blocks), keys)
    token = torch.arange(size).expand(3, size)
    read = layout.at(cache, sub_blocks.unsqueeze(1).expand(3, size), token)
    assert torch.equal(read[0], keys)
    assert torch.equal(read[1], values)
    others = [i for i in range(10) if i not in (7, 2, 9)]
    assert bool(cache.view(10, -1)[others].isnan().all())


@pytest.mark.parametrize("almost", ["odd channels elsewhere", "odd channel first", "tiles mixed"])
def test_what_is_almost_tiled_is_looked_up(almost: str) -> None:
    size, dim = 6, 4
    offsets = torch.arange(size * dim).view(3, dim // 2, 2, 2).permute(0, 2, 1, 3)
    if almost == "odd channel first":
        offsets = offsets.flip(-1)
    if almost == "tiles mixed":
        offsets = offsets[[0, 2, 1]]
    offsets = offsets.reshape(size, dim)
    if almost == "odd channels elsewhere":
        offsets[[0, 1], 1] = offsets[[1, 0], 1]
    half = HalfLayout.of(offsets)
    assert half.kind == "permuted"
    tokens = torch.randn(3, size, dim)
    out = torch.empty_like(tokens)
    half.blocks(half.stored(tokens), torch.arange(3), out)
    assert torch.equal(out, tokens)


@pytest.mark.parametrize("damage", ["twice", "missing", "other-half"])
def test_a_layout_that_is_no_permutation_is_refused(
    monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """For example tokens of two heads interleaved, or a scale stored between them."""
    written = cpu_layout._written

    def damaged(digits: torch.Tensor, *args: object) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = written(digits, *args)
        if damage == "twice":
            keys[1] = keys[0]
        elif damage == "missing":
            keys[5] = -1
        else:
            values[:] = -1
        return keys, values

    monkeypatch.setattr(cpu_layout, "_written", damaged)
    isa = _get_attn_isa(torch.bfloat16, 32, 64)
    with pytest.raises(RuntimeError, match=r"block size 32, head size 64.* is not a permutation"):
        probe_layout(32, 64, torch.bfloat16, isa)


def test_queries_go_sequence_by_sequence() -> None:
    """Row, then KV head, then token: as the kernel wants rows of several tokens."""
    first, counts, heads = [3, 4, 9], [1, 4, 2], 3
    expected = [
        (start + token) * heads + head
        for start, count in zip(first, counts, strict=True)
        for head in range(heads)
        for token in range(count)
    ]
    found = _by_sequence(torch.tensor(first), torch.tensor(counts), heads)
    assert found.tolist() == expected
