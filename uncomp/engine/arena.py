"""Working memory that is taken once, before the engine measures how much is left for the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Of a worker; more lets more layers share a launch.
LEAST_BYTES = 192 << 20
_ALIGNMENT = 256


class Arena:
    """A buffer that tensors are cut from, one after another.

    Args:
        size: bytes.
    """

    def __init__(self, size: int, device: torch.device | str) -> None:
        self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self._used = 0

    @property
    def size(self) -> int:
        """Bytes in all."""
        return self._buffer.numel()

    def clear(self) -> None:
        """Everything that was taken may be overwritten."""
        self._used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised contiguous tensor, aligned to 256 bytes.

        Raises:
            RuntimeError: the arena is too small.
        """
        size = math.prod(shape) * dtype.itemsize
        start = self._used
        if start + size > self.size:
            raise RuntimeError(
                f"uncomp: {start + size} bytes of working memory are needed, {self.size} are there"
            )
        self._used = aligned(start + size)
        return self._buffer[start : start + size].view(dtype).view(*shape)

    def rest(self) -> Tensor:
        """All that is left, as bytes."""
        return self._buffer[self._used :]


def aligned(size: int) -> int:
    """Bytes that `take` uses up for a tensor of `size` bytes."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT
