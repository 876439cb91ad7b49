"""How vLLM's CPU kernels lay out tokens inside a sub-block, found by asking them.

The layout is private to the kernels and differs between instruction sets (AVX-512 stores K
transposed, AMX packs pairs). Instead of assuming one, a probe writes numbered tokens through vLLM's
own cache-write operation and reads back where every number went.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm import _custom_ops as ops

#: bytes of an element -> dtype of two of them
_PAIR = {1: torch.int16, 2: torch.int32, 4: torch.int64}


@dataclass(frozen=True)
class HalfLayout:
    """Layout of the K half or the V half of a sub-block.

    Attributes:
        offsets: [block_size, head_size] int64, where channel c of token t lies.
        kind: "plain" (offsets == t * head_size + c), "transposed" (t + c * block_size), "paired"
            (pairs of channels, transposed in tiles of tokens) or "permuted"; all but the last can
            be read through a view, which is several times faster than looking every element up.
        pairs: of a paired layout: (tokens in a tile, strides between tiles, tokens and pairs).
    """

    offsets: Tensor
    kind: str
    pairs: tuple[int, int, int, int] | None = None

    @classmethod
    def of(cls, offsets: Tensor) -> HalfLayout:
        block, channels = offsets.shape
        order = torch.arange(offsets.numel())
        if torch.equal(offsets, order.view(block, channels)):
            return cls(offsets, "plain")
        if torch.equal(offsets, order.view(channels, block).T):
            return cls(offsets, "transposed")
        pairs = _pairs(offsets)
        return cls(offsets, "permuted" if pairs is None else "paired", pairs)

    def tokens(self, flat: Tensor) -> Tensor:
        """[..., block_size * head_size] as stored -> [..., block_size, head_size]."""
        block, channels = self.offsets.shape
        if self.kind == "plain":
            return flat.unflatten(-1, (block, channels))
        if self.kind == "transposed":
            return flat.unflatten(-1, (channels, block)).transpose(-1, -2)
        if self.pairs is not None:
            tile, *strides = self.pairs
            words = flat.reshape(-1, block * channels).view(_PAIR[flat.element_size()])
            shape = (words.shape[0], block // tile, tile, channels // 2)
            read = words.as_strided(shape, (words.shape[1], *strides)).contiguous()
            return read.view(flat.dtype).view(*flat.shape[:-1], block, channels)
        return flat[..., self.offsets.flatten()].unflatten(-1, (block, channels))

    def rows(self, flat: Tensor, sub_blocks: Tensor, slots: Tensor) -> Tensor:
        """Single tokens: flat [n, block_size * head_size], indices [...] -> [..., head_size]."""
        if self.kind == "plain":
            return flat.unflatten(-1, self.offsets.shape)[sub_blocks, slots]
        return flat[sub_blocks.unsqueeze(-1), self.offsets[slots]]

    def stored(self, tokens: Tensor) -> Tensor:
        """[..., block_size, head_size] -> [..., block_size * head_size] as stored."""
        if self.kind == "plain":
            return tokens.flatten(-2)
        if self.kind == "transposed":
            return tokens.transpose(-1, -2).flatten(-2)
        flat = torch.empty_like(tokens.flatten(-2))
        flat[..., self.offsets.flatten()] = tokens.flatten(-2)
        return flat


@dataclass(frozen=True)
class CacheLayout:
    """Reads and writes whole sub-blocks of one layer's cache.

    ``cache`` is always [num_blocks, num_kv_heads, block_size, 2 * head_size]; sub-block
    ``b * num_kv_heads + h`` is the share of head h of block b.
    """

    key: HalfLayout
    value: HalfLayout

    @staticmethod
    def halves(cache: Tensor) -> Tensor:
        """View [num_sub_blocks, 2, block_size * head_size]: K half, V half."""
        blocks, heads, block_size, width = cache.shape
        return cache.view(blocks * heads, 2, block_size * width // 2)

    def keys(self, cache: Tensor, sub_blocks: Tensor) -> Tensor:
        """Keys of sub-blocks [...] -> [..., block_size, head_size] (a copy)."""
        stored = self.halves(cache)[:, 0].index_select(0, sub_blocks.flatten())
        return self.key.tokens(stored.view(*sub_blocks.shape, -1))

    def values_at(self, cache: Tensor, sub_blocks: Tensor, slots: Tensor) -> Tensor:
        """Values of single tokens, indices [...] -> [..., head_size] (a copy)."""
        return self.value.rows(self.halves(cache)[:, 1], sub_blocks, slots)

    def write(self, cache: Tensor, sub_blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write whole sub-blocks [n]; keys and values are [n, block_size, head_size]."""
        halves = self.halves(cache)
        halves[sub_blocks, 0] = self.key.stored(keys)
        halves[sub_blocks, 1] = self.value.stored(values)


def _pairs(offsets: Tensor) -> tuple[int, int, int, int] | None:
    """`HalfLayout.pairs` of a layout, or ``None`` if it has another form."""
    block, channels = offsets.shape
    if channels % 2 or not torch.equal(offsets[:, 1::2], offsets[:, ::2] + 1):
        return None
    pairs = offsets[:, ::2] // 2
    tokens, step = pairs[:, 0], int(pairs[min(1, block - 1), 0])
    run = (tokens == torch.arange(block) * step).long().cumprod(0)
    tile = int(run.sum())
    if tile == 0 or block % tile:
        return None
    far = int(tokens[tile % block])
    pair = int(pairs[0, 1]) if channels > 2 else 0
    token = torch.arange(block).unsqueeze(1)
    form = token // tile * far + token % tile * step + torch.arange(channels // 2) * pair
    return (tile, far, step, pair) if torch.equal(form, pairs) else None


def probe_layout(block_size: int, head_size: int, dtype: torch.dtype, isa: str) -> CacheLayout:
    """Ask vLLM's ``cpu_attn_reshape_and_cache`` for the layout.

    Raises:
        RuntimeError: the operation does not write each element to one place of its own half, i.e.
            the cache is not one of sub-blocks any more.
    """
    token = torch.arange(block_size).repeat_interleave(head_size)
    channel = torch.arange(head_size).repeat(block_size)
    # bfloat16 holds integers up to 256 exactly: numbers above are written in two digits.
    seen = [
        _written(digit, block_size, head_size, dtype, isa)
        for digit in (token % 128, token // 128, channel % 128, channel // 128)
    ]
    halves = []
    for half in range(2):
        low, high, channel_low, channel_high = (s[half] for s in seen)
        number = (high * 128 + low) * head_size + channel_high * 128 + channel_low
        offsets = torch.full((block_size * head_size,), -1)
        inside = (number >= 0) & (number < offsets.numel())
        offsets[number[inside]] = torch.arange(number.numel())[inside]
        if not bool(inside.all()) or bool((offsets < 0).any()):
            raise RuntimeError(
                f"uncomp: vLLM's CPU cache layout for isa={isa!r}, block size {block_size}, head "
                f"size {head_size}, {dtype} is not a permutation inside a sub-block; this vLLM "
                f"version is not supported on this CPU"
            )
        halves.append(HalfLayout.of(offsets.view(block_size, head_size)))
    return CacheLayout(*halves)


def _written(
    digits: Tensor, block_size: int, head_size: int, dtype: torch.dtype, isa: str
) -> tuple[Tensor, Tensor]:
    """What the K half and the V half hold after writing ``digits`` [block_size * head_size]."""
    cache = torch.full((2, 1, block_size * 2, head_size), -1.0, dtype=dtype)
    key_cache, value_cache = cache.chunk(2, dim=2)
    tokens = digits.view(block_size, 1, head_size).to(dtype)
    ops.cpu_attn_reshape_and_cache(
        tokens,
        tokens.clone(),
        key_cache,
        value_cache,
        torch.arange(block_size, 2 * block_size),  # block 1: block 0 is vLLM's null block
        isa,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )
    halves = cache.view(2, 2, block_size * head_size)[1].to(torch.int64)
    return halves[0], halves[1]
