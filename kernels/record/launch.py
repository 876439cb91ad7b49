"""Copies rows (queries) to remembered places, inside and outside of CUDA graphs."""

from __future__ import annotations

from torch import Tensor

from uncomp.kernels.record.kernel import record_kernel
from uncomp.kernels.variant import Config

DEFAULT = Config({"BLOCK": 1024})


def record(
    rows: Tensor, addresses: Tensor, executions: Tensor, layer: int, source: Tensor | None = None
) -> None:
    """Copy rows to the addresses given for them; count that it ran.

    Args:
        rows: `[T, heads, d]`, any row stride, each row contiguous.
        addresses: `[n]` int64 on the device: where layer 0's copy of an entry goes, 0 for nowhere.
            Layer l's lies `l * heads * d` elements further.
        executions: `[L]` int64; element `layer` is incremented, so that replays of a captured graph
            can be told from its capture.
        layer: which layer.
        source: `[n]` int64 row of each entry; None: entry i is row i.

    Raises:
        ValueError: rows that are not contiguous inside, or more entries than rows.
    """
    entries = addresses.shape[0]
    size = rows.shape[1] * rows.shape[2]
    if rows.stride(2) != 1 or rows.stride(1) != rows.shape[2]:
        raise ValueError(f"record: a row of {list(rows.shape)} {rows.stride()} is not contiguous")
    if source is None and entries > rows.shape[0]:
        raise ValueError(f"record: {entries} addresses for {rows.shape[0]} rows")
    if not entries:
        return
    record_kernel[(entries,)](
        rows,
        addresses if source is None else source,
        addresses,
        executions,
        layer,
        rows.stride(0),
        ROW=size,
        HAS_SOURCE=source is not None,
        BLOCK=DEFAULT.meta["BLOCK"],
        num_warps=DEFAULT.num_warps,
        num_stages=DEFAULT.num_stages,
    )
