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

#: (size, stride) of the digits of a number in mixed radix, the most significant one first
Digits = tuple[tuple[int, int], ...]

#: bytes of an element -> dtype of two of them
_PAIR = {1: torch.int16, 2: torch.int32, 4: torch.int64}


@dataclass(frozen=True)
class HalfLayout:
    """Layout of the K half or the V half of a sub-block.

    Attributes:
        offsets: [block_size, head_size] int64, where channel c of token t lies.
        digits: of token and channel, when they lie at the sum of digits times strides: such a half
            is read through a view, which is several times faster than looking every element up.
        kind: "plain" (offsets == t * head_size + c), "transposed" (t + c * block_size), "tiled"
            (any other with digits) or "permuted" (without).
    """

    offsets: Tensor
    digits: tuple[Digits, Digits] | None
    kind: str

    @classmethod
    def of(cls, offsets: Tensor) -> HalfLayout:
        block, channels = offsets.shape
        token, channel = _digits(offsets[:, 0]), _digits(offsets[0])
        separable = torch.equal(offsets, offsets[:, :1] + offsets[:1])
        if token is None or channel is None or not separable:
            return cls(offsets, None, "permuted")
        kinds: dict[tuple[Digits, Digits], str] = {
            (((block, channels),), ((channels, 1),)): "plain",
            (((block, 1),), ((channels, block),)): "transposed",
        }
        return cls(offsets, (token, channel), kinds.get((token, channel), "tiled"))

    def blocks(self, flat: Tensor, sub_blocks: Tensor, out: Tensor) -> None:
        """Whole sub-blocks: flat [n, block_size * head_size], indices [...] -> out [...,
        block_size, head_size], contiguous."""
        at = sub_blocks.flatten()
        if self.digits is None:
            found = flat.index_select(0, at)
            torch.index_select(found, 1, self.offsets.flatten(), out=out.view(found.shape))
            return
        view = self._view(flat)
        shape = (at.shape[0], *view.shape[1:])
        torch.index_select(view, 0, at, out=out.flatten().view(view.dtype).view(shape))

    def rows(self, flat: Tensor, sub_blocks: Tensor, slots: Tensor) -> Tensor:
        """Single tokens: flat [n, block_size * head_size], indices [...] -> [..., head_size]."""
        if self.digits is None:
            return flat[sub_blocks.unsqueeze(-1), self.offsets[slots]]
        at = [sub_blocks]
        for size, _ in reversed(self.digits[0]):
            at.insert(1, slots % size)
            slots = slots // size
        found = self._view(flat)[tuple(at)].contiguous().view(flat.dtype)
        return found.reshape(*sub_blocks.shape, -1)

    def stored(self, tokens: Tensor) -> Tensor:
        """[n, block_size, head_size] -> [n, block_size * head_size] as stored."""
        flat = tokens.new_empty(tokens.shape[0], self.offsets.numel())
        if self.digits is None:
            flat[:, self.offsets.flatten()] = tokens.flatten(1)
        else:
            view = self._view(flat)
            view.copy_(tokens.contiguous().view(view.dtype).view(view.shape))
        return flat

    def _view(self, flat: Tensor) -> Tensor:
        """[n, block_size * head_size] as stored -> view [n, digits of the token, of the channel].

        Neighbouring channels that lie side by side are one element of twice the size.
        """
        assert self.digits is not None
        token, channel = self.digits
        strides = [stride for _, stride in (*token, *channel[:-1])]
        if channel[-1:] == ((2, 1),) and all(
            stride % 2 == 0 for stride in (flat.stride(0), *strides)
        ):
            flat = flat.view(_PAIR[flat.element_size()])
            token, channel = _halved(token), _halved(channel[:-1])
        sizes, steps = zip((flat.shape[0], flat.stride(0)), *token, *channel, strict=True)
        return flat.as_strided(sizes, steps)


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

    def keys(self, cache: Tensor, sub_blocks: Tensor, out: Tensor) -> None:
        """Copies the keys of sub-blocks [...] to out [..., block_size, head_size], contiguous."""
        self.key.blocks(self.halves(cache)[:, 0], sub_blocks, out)

    def at(self, cache: Tensor, sub_blocks: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of single tokens, indices [...] -> twice [..., head_size] (copies)."""
        halves = self.halves(cache)
        keys = self.key.rows(halves[:, 0], sub_blocks, slots)
        return keys, self.value.rows(halves[:, 1], sub_blocks, slots)

    def write(self, cache: Tensor, sub_blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write whole sub-blocks [n]; keys and values are [n, block_size, head_size]."""
        halves = self.halves(cache)
        halves[sub_blocks, 0] = self.key.stored(keys)
        halves[sub_blocks, 1] = self.value.stored(values)


def _digits(offsets: Tensor) -> Digits | None:
    """Digits of the numbers 0, 1, ... that lie at these offsets; ``None`` if they have no strides.

    Raises:
        ValueError: no offsets.
    """
    count = offsets.numel()
    if count == 0:
        raise ValueError("a layout needs at least one token and one channel, got none")
    if count == 1:
        return () if int(offsets[0]) == 0 else None
    step = int(offsets[1])
    in_step = (offsets == torch.arange(count) * step).long()
    run = int(in_step.cumprod(0).sum())
    if step < 1 or run < 2 or count % run:
        return None
    higher = _digits(offsets[::run])
    inner = offsets.view(-1, run) - offsets[::run, None]
    if higher is None or not bool((inner == offsets[:run]).all()):
        return None
    return (*higher, (run, step))


def _halved(digits: Digits) -> Digits:
    return tuple((size, stride // 2) for size, stride in digits)


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
