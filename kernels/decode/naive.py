"""Attention of the newest tokens of every row over what its heads hold: reference."""

from __future__ import annotations

import torch
from torch import Tensor

from uncomp.kernels.paged import Caches, Holdings, Rows, gather


def decode_reference(
    caches: Caches,
    layer: int,
    query: Tensor,
    query_start: Tensor,
    rows: Rows,
    holdings: Holdings,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Arguments as in `launch.decode`.

    Returns:
        `[T, Hq, d]` float64; NaN in tokens that belong to no row. A query that sees no entry gets
        zero.
    """
    group = query.shape[1] // caches.heads
    out = torch.full(query.shape, float("nan"), dtype=torch.float64, device=query.device)
    starts = query_start.tolist()
    for row in range(len(starts) - 1):
        begin, end = starts[row], starts[row + 1]
        if begin == end:
            continue
        keys, values, lengths = gather(caches, rows, holdings, row, layer)
        for head in range(query.shape[1]):
            held = int(lengths[head // group])
            q = query[begin:end, head].double()
            k = keys[head // group, :held].double()
            v = values[head // group, :held].double()
            logits = scale * q @ k.T
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            # query i of m sees all but the last m - 1 - i entries
            last = held - (end - begin) + torch.arange(end - begin, device=query.device)
            hidden = torch.arange(held, device=query.device)[None, :] > last[:, None]
            logits = logits.masked_fill(hidden, -torch.inf)
            if sinks is not None:
                sink = sinks[head].double().expand(end - begin, 1)
                logits = torch.cat([logits, sink], 1)
                v = torch.cat([v, torch.zeros_like(v[:1] if held else q[:1])])
            # softmax over -inf only is NaN: nothing seen
            out[begin:end, head] = torch.softmax(logits, 1).nan_to_num(0.0) @ v
    return out
