"""Times of decode attention at Llama-3.1-8B's shape, against memory bandwidth and FlashAttention.

Decode attention reads every key and value once and does little else: what it reaches of the
measured copy bandwidth is how good it is.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from uncomp.eval.bench import gpu_baseline, gpu_pipeline
from uncomp.eval.bench.gpu_cases import FP8, LLAMA, TOY, Case, Shape, timed_case
from uncomp.eval.bench.gpu_timing import Timer, Work, median, micros, row
from uncomp.eval.bench.rows import Row
from uncomp.kernels.decode import DecodeWorkspace, decode, plan, programs
from uncomp.kernels.decode.launch import CONFIGS, PROGRAMS_EACH
from uncomp.kernels.paged import Holdings, head_lengths


@dataclass(frozen=True)
class Sizes:
    """What is timed.

    Attributes:
        shape: of the model.
        rows, tokens, kept: batch, context, tokens kept of it per head (mean).
        layers: of the compressed batch, so that it does not fit in the L2.
        copied: bytes of the copy.
        repeats, warm: of every measurement.
        configs: how many tilings of the decode kernel are timed.
    """

    shape: Shape
    rows: int
    tokens: int
    kept: int
    layers: int
    copied: int
    repeats: int
    warm: int
    configs: int


REAL = Sizes(LLAMA, 64, 32768, 384, 8, 8 << 30, 30, 5, len(CONFIGS))
DRY = Sizes(TOY, 2, 96, 48, 2, 1 << 16, 1, 0, 2)


def bench(device: torch.device, dry: bool, say: Callable[[str], None]) -> Iterator[list[Row]]:
    """Times of decode attention, then of the compaction pipeline."""
    sizes = DRY if dry else REAL
    timer = Timer(device, sizes.repeats, sizes.warm)
    say("copy bandwidth")
    bandwidth, rows = copy_bandwidth(timer, sizes.copied)
    yield rows
    for dtype in (torch.bfloat16, FP8):
        for layout in ("NHD",) if dry else ("NHD", "HND"):
            for compressed in (True, False):
                kind = f"{sizes.kept} of {sizes.tokens}" if compressed else f"{sizes.tokens}"
                say(f"decode attention, {_name(dtype)}, {layout}, {kind} tokens")
                found = decode_rows(timer, sizes, dtype, layout, compressed, bandwidth)
                # Bars are for the layout that vLLM has; the other one is there to compare.
                yield found if layout == "NHD" else [_unjudged(r) for r in found]
                _free(device)
    say("decode attention, layers share")
    shared = decode_rows(timer, sizes, torch.bfloat16, "NHD", True, bandwidth, shared=True)
    yield [_unjudged(r) for r in shared]
    _free(device)
    yield from gpu_pipeline.bench(timer, dry, say)


def copy_bandwidth(timer: Timer, size: int) -> tuple[float, list[Row]]:
    """Bytes per second of a large copy on the device, read and written ones counted."""
    source = torch.randint(0, 255, (size // 2,), dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    seconds = timer.times(copy=lambda: target.copy_(source))["copy"]
    rates = [2 * source.numel() / s / 1e12 for s in seconds]
    found = row(f"copy of {size >> 20} MiB", "bandwidth", "TB/s", rates)
    return found.value * 1e12, [found]


def decode_rows(
    timer: Timer,
    sizes: Sizes,
    dtype: torch.dtype,
    layout: str,
    compressed: bool,
    bandwidth: float,
    shared: bool = False,
) -> list[Row]:
    """One batch: the default tiling, the others, and FlashAttention where nothing is compressed."""
    case = decode_case(timer.device, sizes, dtype, layout, compressed, shared)
    shape, rows = case.shape, len(case.rows.lengths)
    read = decode_bytes(case) / shape.layers
    kind = f"{sizes.kept} of {sizes.tokens}" if compressed else f"{sizes.tokens}"
    setting = f"decode attention, {rows} rows, {kind} tokens, {_name(dtype)}, {layout}"
    setting += ", layers share" * shared
    query = torch.stack([case.queries(rows, seed=layer) for layer in range(shape.layers)])
    out = torch.empty_like(query)
    sides: dict[str, Work] = {"decode": _all_layers(timer, case, query, out, None, 4)}
    other = None if compressed else gpu_baseline.flash(case, query[0])
    if other is not None:
        sides["flash"] = timer.graph(other.work)
    seconds = {name: [s / shape.layers for s in v] for name, v in timer.times(**sides).items()}
    mine = seconds["decode"]
    found = [
        micros(setting, "time of a layer", mine),
        row(setting, "read per layer", "MB", [read / 1e6]),
        row(
            setting, "share of copy bandwidth", "", [read / s / bandwidth for s in mine], least=0.8
        ),
    ]
    if other is not None:
        ratio = median(seconds["flash"]) / median(mine)
        found.append(micros(setting, f"time of {other.name}", seconds["flash"]))
        # Torch's dense kernel has no block table to read: it stands in, it does not decide.
        least = 1.0 if other.paged and dtype == torch.bfloat16 else None
        found.append(row(setting, f"time of {other.name} over ours", "x", [ratio], least=least))
    if shared:
        return found
    found.append(_plan_row(timer, case, sizes.shape.layers, setting))
    if layout == "NHD":
        found += _config_rows(timer, sizes, case, query, out, setting)
    return found


def decode_case(
    device: torch.device,
    sizes: Sizes,
    dtype: torch.dtype,
    layout: str,
    compressed: bool,
    shared: bool = False,
) -> Case:
    """Rows at `tokens`; compressed ones keep `kept` tokens a head, unequal ones."""
    layers = sizes.layers if compressed else 1
    shape = replace(sizes.shape, layers=layers)
    rows = sizes.rows
    if not compressed and device.type == "cuda":
        # As many as fit twice: FlashAttention may need a cache of its own.
        free = torch.cuda.mem_get_info(device)[0]
        each = sizes.tokens * shape.heads * shape.entry_bytes(dtype)
        rows = min(rows, int(0.4 * free / each))
    full = sizes.tokens // shape.block
    kept = (sizes.kept // shape.block, full) if compressed else None
    lengths = [sizes.tokens] * rows
    return timed_case(shape, lengths, [kept] * rows, dtype, layout, device, shared=shared)


def decode_bytes(case: Case) -> int:
    """Of keys and values that the rows hold in all layers."""
    entries = head_lengths(case.rows, case.holdings, case.shape.block).sum()
    return int(entries) * case.shape.entry_bytes(case.caches.dtype)


def _all_layers(
    timer: Timer, case: Case, query: Tensor, out: Tensor, config: object, each: int
) -> Work:
    """Attention of every layer, as one graph. each: programs for a multiprocessor."""
    shape, rows = case.shape, len(case.rows.lengths)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=case.device)
    workspace = DecodeWorkspace.empty(
        layers=shape.layers, rows=rows, heads=shape.heads, group=shape.group, head_size=shape.size,
        programs=programs(case.device) * each // PROGRAMS_EACH, device=case.device,
    )  # fmt: skip
    plan(workspace, case.rows, starts, case.holdings, shape.block)

    def work() -> None:
        for layer in range(shape.layers):
            decode(
                workspace, case.caches, layer, query[layer], out[layer], starts, case.rows,
                case.holdings, shape.size**-0.5, config=config,  # type: ignore[arg-type]
            )  # fmt: skip

    return timer.graph(work)


def _plan_row(timer: Timer, case: Case, layers: int, setting: str) -> Row:
    """The plan of a step for all layers of the model."""
    shape, rows = case.shape, len(case.rows.lengths)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=case.device)
    held = case.holdings
    counts, offsets = (t[:1].repeat(layers, 1, 1) for t in (held.counts, held.offsets))
    holdings = Holdings(counts, offsets, held.spans)
    workspace = DecodeWorkspace.empty(
        layers=layers, rows=rows, heads=shape.heads, group=shape.group, head_size=shape.size,
        programs=programs(case.device), device=case.device,
    )  # fmt: skip
    work = timer.graph(lambda: plan(workspace, case.rows, starts, holdings, shape.block))
    return micros(setting, f"plan of {layers} layers", timer.times(plan=work)["plan"])


def _config_rows(
    timer: Timer, sizes: Sizes, case: Case, query: Tensor, out: Tensor, setting: str
) -> list[Row]:
    """Every tiling with 2, 3, 4 and 6 programs for a multiprocessor; the best one once more."""
    sides: dict[str, Work] = {}
    found: list[Row] = []
    for config in CONFIGS[: sizes.configs]:
        for each in (2, 3, 4, 6) if timer.cuda else (3,):
            name = f"tiling {config}, {each} programs a multiprocessor"
            try:
                sides[name] = _all_layers(timer, case, query, out, config, each)
            except Exception as error:  # does not fit this device
                found.append(row(setting, f"{name}: {type(error).__name__}", "", [float("nan")]))
    seconds = {
        name: [s / case.shape.layers for s in taken] for name, taken in timer.times(**sides).items()
    }
    found += [micros(setting, name, taken) for name, taken in seconds.items()]
    best = min(seconds, key=lambda name: median(seconds[name]))
    return [*found, micros(setting, f"best {best}", seconds[best])]


def _unjudged(found: Row) -> Row:
    return replace(found, bar="", verdict="")


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", FP8: "fp8"}[dtype]


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
