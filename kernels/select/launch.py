"""Launchers of the Triton kernels: limits, pooling and choice for several layers and requests."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from uncomp.kernels.paged import Holdings, Rows
from uncomp.kernels.variant import Config

from .kernel import choose_kernel, ema_kernel, limits_kernel, places_kernel, pool_kernel
from .naive import BREAK, POOLINGS, UNIT, Pooling, before_length, reach

#: entries of a step of `limits` and `choose`; the first is the default, the others are timed by
#: the GPU benchmark
CONFIGS = (
    Config({"TILE": 4096}, num_warps=8, num_stages=1),
    Config({"TILE": 2048}, num_warps=8, num_stages=1),
    Config({"TILE": 1024}, num_warps=4, num_stages=1),
)
POOL_CONFIGS = (Config({"TILE": 1024}, num_warps=4, num_stages=1),)


@dataclass(frozen=True)
class Terms:
    """What may stay and what must. L layers, R requests, H heads.

    An entry is eligible if its token lies in a full block. An eligible one is forced if its
    position is below `sinks` or in a protected span, or if it is one of the last `window` tokens.

    Attributes:
        rows, holdings: see `uncomp.kernels.paged`; the holdings before this compaction.
        positions: `[L, num_blocks, H, block_size]` int32, contiguous: position of every kept entry,
            at the place of the entry. Read for the kept entries of compacted requests only. Where
            layers share, a part of a table of all layers.
        full: `[R]` int32, full blocks of the sequence at this compaction.
        protect: `[R, P, 2]` int32, half-open spans of positions; P may be 0, unused spans are
            empty ones (0, 0).
        sinks, window: tokens.
    """

    rows: Rows
    holdings: Holdings
    positions: Tensor
    full: Tensor
    protect: Tensor
    sinks: int
    window: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, R, H)."""
        layers, _, heads = self.holdings.counts.shape
        return layers, self.rows.lengths.shape[0], heads

    @property
    def block_size(self) -> int:
        return self.positions.shape[3]


def limits(
    terms: Terms,
    eligible: Tensor | None = None,
    forced: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Number of eligible and of forced entries of every head.

    Args:
        eligible, forced: `[L, R, H]` int32, contiguous, written; None allocates.
        config: tiling; None means the default.

    Returns:
        `eligible`, `forced`. The eligible entries of a head are its first ones.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    name = "limits"
    _check_terms(name, terms)
    device = terms.positions.device
    if eligible is None:
        eligible = torch.empty(terms.shape, dtype=torch.int32, device=device)
    if forced is None:
        forced = torch.empty_like(eligible)
    _check(name, "eligible", eligible, terms.shape, device)
    _check(name, "forced", forced, terms.shape, device)
    config = config or CONFIGS[0]
    if eligible.numel() == 0:
        return eligible, forced
    rows, holdings = terms.rows, terms.holdings
    limits_kernel[(eligible.numel(),)](
        rows.blocks, rows.lengths, rows.slots, holdings.counts, holdings.offsets, holdings.spans,
        terms.positions, terms.full, terms.protect, eligible, forced,
        terms.shape[1], holdings.slots, terms.positions.shape[1], rows.blocks.stride(0),
        terms.protect.shape[1], holdings.start, terms.sinks, terms.window,
        HEADS=terms.shape[2], BLOCK_SIZE=terms.block_size, SHARED=holdings.shared, **config.meta,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return eligible, forced


def entry_places(places: Tensor, terms: Terms, out: Tensor) -> Tensor:
    """The place of every entry, from that of every position.

    Args:
        places: `[R, P]` int32, contiguous: where every position stands, see `naive.ema_pool`.
        out: `[L, R, H, N]` int32, contiguous, written up to the entries of every head; those of
            positions from P on get 0.

    Returns:
        `out`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    name = "entry_places"
    _check_terms(name, terms)
    layers, requests, heads = terms.shape
    positions = places.shape[1] if places.dim() == 2 else -1
    _check(name, "places", places, (requests, positions), terms.positions.device)
    entries = out.shape[3] if out.dim() == 4 else -1
    _check(name, "out", out, (layers, requests, heads, entries), terms.positions.device)
    if out.numel() == 0:
        return out
    config = POOL_CONFIGS[0]
    rows, holdings = terms.rows, terms.holdings
    grid = (layers * requests * heads, triton.cdiv(entries, config.meta["TILE"]))
    places_kernel[grid](
        places, out,
        rows.blocks, rows.lengths, rows.slots, holdings.counts, holdings.offsets, holdings.spans,
        terms.positions, requests, holdings.slots, terms.positions.shape[1], entries, positions,
        rows.blocks.stride(0), holdings.start,
        HEADS=heads, BLOCK_SIZE=terms.block_size, SHARED=holdings.shared, **config.meta,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def pool(
    raw: Tensor,
    terms: Terms,
    width: int,
    out: Tensor,
    kind: Pooling = "max",
    places: Tensor | None = None,
) -> Tensor:
    """`naive.pool_scores` with the recent window left out.

    Args:
        raw: `[L, R, H, N]` float32, contiguous; N at least the entries of the longest head.
        width: "max": odd number of entries, 1 only leaves out the window; otherwise the length.
        out: like `raw`, another tensor; entries of a head are written (-inf in the window),
            nothing beyond them is.
        kind: "max", "ema" or "word".
        places: `[L, R, H, N]` int32, contiguous, not falling along N; read for "word" only.

    Returns:
        `out`. A neighbourhood with NaN is NaN.

    Raises:
        ValueError: `width` not a positive odd number ("ema", "word": below 1), an unknown kind, no
            places where they are needed, `out` the same memory as `raw`, or shapes, dtypes or
            devices that do not fit.
    """
    name = "pool"
    if kind not in POOLINGS:
        raise ValueError(f"{name}: kind must be one of {list(POOLINGS)}, got {kind!r}")
    if width < 1 or (kind == "max" and width % 2 == 0):
        raise ValueError(
            f"{name}: width must be a positive {'odd ' if kind == 'max' else ''}number, got {width}"
        )
    _check_terms(name, terms)
    _check_scores(name, terms, {"raw": raw, "out": out})
    if kind == "word":
        if places is None:
            raise ValueError(f"{name}: kind 'word' needs the place of every entry")
        _check(name, "places", places, tuple(raw.shape), raw.device)
    if raw.numel() == 0:
        return out
    if raw.data_ptr() == out.data_ptr():
        raise ValueError(f"{name}: out must not be raw: neighbours are read after they are written")
    config = POOL_CONFIGS[0]
    rows, holdings, entries = terms.rows, terms.holdings, raw.shape[3]
    layers, requests, heads = terms.shape
    grid = (layers * requests * heads, triton.cdiv(entries, config.meta["TILE"]))
    table = (rows.lengths, rows.slots, holdings.counts, holdings.offsets, holdings.spans)
    numbers = (requests, holdings.slots, entries, terms.window)
    constants = {"HEADS": heads, "BLOCK_SIZE": terms.block_size, **config.meta}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if kind == "max":
        pool_kernel[grid](raw, out, *table, *numbers, WIDTH=width, **constants, **options)
    else:
        given = places if kind == "word" and places is not None else rows.lengths
        compiled = ema_constants(width, kind == "word")
        ema_kernel[grid](raw, out, given, *table, *numbers, **compiled, **constants, **options)
    return out


def ema_constants(length: int, by_place: bool = False) -> dict[str, int | float]:
    """What `ema_kernel` is compiled for."""
    before = before_length(length)
    rate = math.log2(math.e) / (UNIT if by_place else 1)
    return {
        "AFTER": reach(length, by_place), "AFTER_RATE": rate / length,
        "BEFORE": reach(before, by_place), "BEFORE_RATE": rate / before,
        "APART": BREAK if by_place else 0,
    }  # fmt: skip


def choose(
    raw: Tensor,
    pooled: Tensor,
    terms: Terms,
    counts: Tensor,
    offsets: Tensor,
    out: Tensor,
    config: Config | None = None,
) -> Tensor:
    """`naive.top_entries`: which entries of every head stay.

    All forced ones, then the best eligible ones by pooled score, raw score, lower entry number; NaN
    ranks with -inf. The sub-blocks that a head keeps decide how many.

    Args:
        raw, pooled: `[L, R, H, N]` float32, contiguous; only eligible entries are read. May be the
            same tensor.
        counts: `[L, R, H]` int32, sub-blocks that the head shall have. `counts * block_size` is at
            most its eligible entries and at least its forced ones (see `limits`). A head with fewer
            eligible entries gets those; one with more forced entries the first of them.
        offsets: `[L, R, H]` int32, exclusive sum of `counts` over the heads.
        out: `[L, R, K]` int32, K at least block_size times the largest sum of counts. Entries of
            head h: ascending, from `offsets * block_size` on. Nothing else is written.
        config: tiling; None means the default.

    Returns:
        `out`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    name = "choose"
    _check_terms(name, terms)
    _check_scores(name, terms, {"raw": raw, "pooled": pooled})
    layers, requests, heads = terms.shape
    device = raw.device
    _check(name, "counts", counts, terms.shape, device)
    _check(name, "offsets", offsets, terms.shape, device)
    width = out.shape[2] if out.dim() == 3 else -1
    _check(name, "out", out, (layers, requests, width), device)
    if counts.numel() == 0 or out.numel() == 0:
        return out
    config = config or CONFIGS[0]
    rows, holdings = terms.rows, terms.holdings
    choose_kernel[(counts.numel(),)](
        raw, pooled, out, counts, offsets,
        rows.blocks, rows.lengths, rows.slots, holdings.counts, holdings.offsets, holdings.spans,
        terms.positions, terms.full, terms.protect,
        requests, holdings.slots, terms.positions.shape[1], raw.shape[3], width,
        rows.blocks.stride(0), terms.protect.shape[1], holdings.start, terms.sinks, terms.window,
        HEADS=heads, BLOCK_SIZE=terms.block_size, SHARED=holdings.shared, **config.meta,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def _check_terms(name: str, terms: Terms) -> None:
    rows, holdings, positions = terms.rows, terms.holdings, terms.positions
    device = positions.device
    requests = rows.lengths.shape[0] if rows.lengths.dim() == 1 else -1
    layers, slots, heads = holdings.counts.shape if holdings.counts.dim() == 3 else (-1, -1, -1)
    blocks, block_size = positions.shape[1::2] if positions.dim() == 4 else (-1, -1)
    spans = terms.protect.shape[1] if terms.protect.dim() == 3 else -1
    for what, tensor, shape in (
        ("rows.lengths", rows.lengths, (requests,)),
        ("rows.slots", rows.slots, (requests,)),
        ("full", terms.full, (requests,)),
        ("protect", terms.protect, (requests, spans, 2)),
        ("positions", positions, (layers, blocks, heads, block_size)),
        ("holdings.counts", holdings.counts, (layers, slots, heads)),
        ("holdings.offsets", holdings.offsets, (layers, slots, heads)),
        ("holdings.spans", holdings.spans, (slots, 2)),
    ):
        _check(name, what, tensor, shape, device)
    table = rows.blocks
    if table.dim() != 2 or table.shape[0] != requests or table.dtype != torch.int32:
        raise ValueError(
            f"{name}: rows.blocks must be int32 [{requests}, W], got {list(table.shape)} "
            f"{table.dtype}"
        )
    if terms.sinks < 0 or terms.window < 0:
        raise ValueError(
            f"{name}: sinks and window must not be negative, got {terms.sinks}, {terms.window}"
        )


def _check_scores(name: str, terms: Terms, scores: dict[str, Tensor]) -> None:
    first = next(iter(scores.values()))
    entries = first.shape[3] if first.dim() == 4 else -1
    for what, tensor in scores.items():
        shape = (*terms.shape, entries)
        _check(name, what, tensor, shape, terms.positions.device, torch.float32)


def _check(
    name: str,
    what: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.int32,
) -> None:
    fits = tuple(tensor.shape) == tuple(shape) and tensor.dtype == dtype
    if not fits or not tensor.is_contiguous() or tensor.device != device:
        wanted = ["?" if size < 0 else size for size in shape]
        raise ValueError(
            f"{name}: {what} must be contiguous {dtype} {wanted} on {device}, got "
            f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )
