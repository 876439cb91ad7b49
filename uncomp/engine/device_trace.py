"""What a compaction on a device kept, for tests and for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from uncomp.engine.orders import Order
from uncomp.kernels.paged import Holdings


def write_trace(
    path: Path,
    order: Order,
    holdings: Holdings,
    slot: int,
    positions: Tensor,
    layer_numbers: Sequence[int],
) -> None:
    """Append a line about an order that was carried out; waits for the device.

    Args:
        positions: [layers, num_blocks, heads, block_size] int32, see `DeviceCompactor`.
        layer_numbers: of the layers in the whole model, in which order the line has them.
    """
    counts, offsets = holdings.counts[:, slot].tolist(), holdings.offsets[:, slot].tolist()
    blocks = torch.tensor(order.kept_blocks)
    tables = positions.cpu()[:, blocks].flatten(1, 2)  # [layers, dealt, block_size]
    if holdings.shared:  # one list for all layers
        tables = tables.flatten(0, 1).expand(len(counts), -1, -1)
    kept = {
        number: [table[at : at + n].flatten().tolist() for at, n in zip(offset, count, strict=True)]
        for number, table, offset, count in zip(layer_numbers, tables, offsets, counts, strict=True)
    }
    record = {
        "request_id": order.request_id,
        "generation": order.generation,
        "num_tokens": order.num_tokens,
        "full_blocks": order.full_blocks,
        "block_size": positions.shape[3],
        "kept": [kept[number] for number in sorted(kept)],
    }
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
