"""The orders of a step as tensors that kernels read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from uncomp.engine.device_state import DeviceRequests, to_device
from uncomp.engine.orders import Order
from uncomp.kernels.paged import Caches, Rows
from uncomp.spans import places


@dataclass(frozen=True)
class Job:
    """An order with what the runner knows.

    Attributes:
        row: row of the request in the device block table.
        queries: [layers, w, query heads, head size], oldest first, or None.
    """

    order: Order
    row: int
    queries: Tensor | None


@dataclass(frozen=True)
class Facts:
    """What the kernels need to know of the requests of one launch; R requests.

    Attributes:
        rows: block rows, lengths, and slots before this compaction.
        entries: columns that hold the longest head.
        full: [R] int32, full blocks.
        kept: [R] int32, blocks that stay.
        kept_blocks: [R, n] int32.
        protect: [R, P, 2] int32.
        places: [R, T] int32, where every position below T stands (`uncomp.spans.places`), T at
            least the longest sequence; no columns where no order tells.
        stride: [R] int32, sampling of the entropy.
        queries: [layers, R, w, query heads, head size] or None.
    """

    rows: Rows
    entries: int
    full: Tensor
    kept: Tensor
    kept_blocks: Tensor
    protect: Tensor
    places: Tensor
    stride: Tensor
    queries: Tensor | None


def facts_of(
    jobs: list[Job], table: Tensor, requests: DeviceRequests, caches: Caches, samples: int
) -> Facts:
    """Tensors of several orders.

    Args:
        table: [rows, width] int32, vLLM's block table on the device.
        samples: keys of a head that the entropy is measured on, at most about.
    """
    device, orders = caches.device, [job.order for job in jobs]
    longest = [most_entries(order, requests, caches.block_size) for order in orders]
    lists = [
        [order.num_tokens for order in orders],
        [requests.index_of(order.request_id) for order in orders],
        [order.full_blocks for order in orders],
        [len(order.kept_blocks) for order in orders],
        [max(1, math.ceil(entries / samples)) for entries in longest],
        [job.row for job in jobs],
    ]
    # Padded: every list starts at a multiple of 16 bytes, which kernels are specialised on.
    padding = [0] * (-len(jobs) % 4)
    numbers = to_device([numbers + padding for numbers in lists], torch.int32, device)
    numbers = numbers[:, : len(jobs)]
    width = max(len(order.kept_blocks) for order in orders)
    blocks = [(*o.kept_blocks, *[0] * (width - len(o.kept_blocks))) for o in orders]
    spans = max(len(order.protect) for order in orders)
    protect = [(*o.protect, *[(0, 0)] * (spans - len(o.protect))) for o in orders]
    queries = None
    if jobs[0].queries is not None:
        queries = torch.stack([cast(Tensor, job.queries) for job in jobs], 1)
    return Facts(
        Rows(table.index_select(0, numbers[5]), numbers[0], numbers[1]),
        widest(jobs, requests, caches.block_size),
        numbers[2],
        numbers[3],
        to_device(blocks, torch.int32, device),
        to_device(protect, torch.int32, device).view(len(jobs), spans, 2),
        _places(orders, device),
        numbers[4],
        queries,
    )


def _places(orders: list[Order], device: torch.device) -> Tensor:
    longest = max((o.num_tokens for o in orders if o.gaps), default=0)
    # Rounded up as in `widest`.
    numbers = np.zeros((len(orders), -(-longest // 64) * 64), dtype=np.int32)
    for row, order in enumerate(orders):
        if order.gaps:
            numbers[row, : order.num_tokens] = places(order.gaps, order.num_tokens)
    return to_device(numbers, torch.int32, device)  # type: ignore[arg-type]


def widest(jobs: list[Job], requests: DeviceRequests, block_size: int) -> int:
    """Columns for the longest head of these orders.

    Rounded up: kernels are specialised on whether a width is a multiple of 16.
    """
    longest = max(most_entries(job.order, requests, block_size) for job in jobs)
    return -(-longest // 64) * 64


def most_entries(order: Order, requests: DeviceRequests, block_size: int) -> int:
    """Most entries that a head of the request can hold; the device knows how many it does."""
    slot = requests.slots.get(order.request_id)
    if slot is None:
        return order.num_tokens
    return (slot.most - slot.full_blocks) * block_size + order.num_tokens
