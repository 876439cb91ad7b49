"""GPU side of a worker: where compressed heads live, and the last queries of requests.

Everything that a captured CUDA graph reads is allocated once and changed in place. Numbers go to
the device by pinned, asynchronous copies; nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from uncomp.kernels.paged import Holdings


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A host list or array as a device tensor, without waiting (the pinned source is kept until
    copied)."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


@dataclass
class DeviceSlot:
    """One compressed request.

    Attributes:
        index: slot in the `Holdings`.
        generation: compactions so far; must equal the scheduler's count. 0: only pruned.
        full_blocks: full blocks at the last compaction; later ones are the tail.
        held: sub-blocks that hold what was kept, in each layer.
        most: sub-blocks that a head can have kept at most.
        entropy: [layers, heads] on the device, kept for later compactions; or None.
        counts: [layers, heads] int64 in host memory, sub-blocks that heads have kept, where all
            layers share one budget; or None.
    """

    index: int
    generation: int
    full_blocks: int
    held: tuple[int, ...]
    most: int
    entropy: Tensor | None
    counts: Tensor | None = None


class DeviceRequests:
    """All compressed requests of one worker.

    Args:
        layers, heads: attention layers and KV heads of this rank.
        max_requests: requests that run at once at most.
        shared: whether entries of a layer may lie in other layers' caches.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        max_requests: int,
        device: torch.device,
        shared: bool = False,
    ) -> None:
        self.slots: dict[str, DeviceSlot] = {}
        self.holdings = Holdings.empty(layers, max_requests, heads, device, shared)
        self._free = list(range(max_requests - 1, -1, -1))

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.slots

    def __len__(self) -> int:
        return len(self.slots)

    def index_of(self, request_id: str) -> int:
        """Slot of a request, -1 if it is not compressed."""
        slot = self.slots.get(request_id)
        return -1 if slot is None else slot.index

    def take(self) -> int:
        """A free slot."""
        if not self._free:
            raise RuntimeError(
                f"uncomp: all {self.holdings.slots} slots for compressed requests are taken; the "
                "engine runs more requests than max_num_seqs"
            )
        return self._free.pop()

    def drop(self, request_id: str) -> None:
        """Forget a request (finished, preempted, resumed, or its id reused)."""
        slot = self.slots.pop(request_id, None)
        if slot is not None:
            self._free.append(slot.index)

    def place_pruned(
        self,
        request_id: str,
        num_tokens: int,
        blocks: Tensor,
        kept: Sequence[Tensor],
        positions: Tensor,
    ) -> None:
        """Record what a pruned prompt left in every layer, at the end of its blocks.

        Args:
            blocks: [full blocks] int32 on the device, ids of the prompt's full blocks.
            kept: per layer [n] int64 on the device, the positions it holds, ascending; a whole
                number of blocks fewer than `num_tokens`, and the last ones among them. Layers of a
                stage share a tensor.
            positions: [layers, num_blocks, heads, block_size] int32; written to.
        """
        size = positions.shape[3]
        full = num_tokens // size
        dropped = [(num_tokens - len(at)) // size for at in kept]
        start = 0
        for _, same in groupby(kept, id):
            stop = start + len(list(same))
            here = blocks[dropped[start] :].long()
            at = kept[start][: len(here) * size].to(torch.int32).view(1, -1, 1, size)
            shape = (stop - start, len(here), *positions.shape[2:])
            positions[start:stop].index_copy_(1, here, at.expand(shape))
            start = stop
        slot, holdings, heads = self.take(), self.holdings, positions.shape[2]
        counts = to_device([-n for n in dropped], torch.int32, positions.device)
        holdings.counts[:, slot] = counts.unsqueeze(1)
        holdings.offsets[:, slot] = 0
        holdings.spans[slot].copy_(to_device([full, 0], torch.int32, positions.device))
        held = tuple((full - n) * heads for n in dropped)
        self.slots[request_id] = DeviceSlot(slot, 0, full, held, full, None)


class QueryStore:
    """The last `window` queries of the requests about to be compacted.

    A request has a buffer [window, layers, query heads, head size]; position p of it lies in row
    `p % window`. Buffers are made in fours when they are needed and never move, because captured
    graphs write to their addresses.
    """

    def __init__(
        self,
        layers: int,
        window: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.window = window
        self._shape = (window, layers, *shape)
        self._dtype, self._device = dtype, device
        self._row_bytes = layers * shape[0] * shape[1] * dtype.itemsize
        self._free: list[Tensor] = []
        self._of: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self._of)

    def addresses(self, request_id: str, first: int, last: int) -> list[int]:
        """Where the queries at positions [first, last) of layer 0 go; at most `window` of them."""
        buffer = self._of.get(request_id)
        if buffer is None:
            buffer = self._of[request_id] = self._take()
        start = buffer.data_ptr()
        return [start + p % self.window * self._row_bytes for p in range(first, last)]

    def last(self, request_id: str, num_tokens: int, window: int) -> Tensor:
        """[layers, w, query heads, head size], the last w = `window` (or all there are) queries
        before `num_tokens`, a copy.

        Raises:
            RuntimeError: none were recorded.
        """
        return self._ordered(request_id, num_tokens, window).transpose(0, 1).contiguous()

    def of_layer(self, layer: int, request_id: str, num_tokens: int, window: int) -> Tensor:
        """[w, query heads, head size] of one layer, see `last`."""
        return self._ordered(request_id, num_tokens, window, layer)

    def _ordered(
        self, request_id: str, num_tokens: int, window: int, layer: int | None = None
    ) -> Tensor:
        if request_id not in self._of:
            raise RuntimeError(
                f"uncomp: no queries were recorded for {request_id}, whose cache is to be scored "
                f"at {num_tokens} tokens"
            )
        buffer, oldest = self._of[request_id], num_tokens % self.window
        if layer is not None:
            buffer = buffer[:, layer]
        if num_tokens < self.window:
            ordered = buffer[:num_tokens]
        else:
            ordered = torch.cat([buffer[oldest:], buffer[:oldest]])
        return ordered[-window:]

    def drop(self, request_id: str) -> None:
        buffer = self._of.pop(request_id, None)
        if buffer is not None:
            self._free.append(buffer)

    def _take(self) -> Tensor:
        if not self._free:
            made = torch.zeros(4, *self._shape, dtype=self._dtype, device=self._device)
            self._free = list(made)
        return self._free.pop()
