"""Every kernel against its reference on the device, before anything is timed.

Random inputs, unused memory and outputs poisoned with NaN, unequal heads, requests compressed and
not. An error is the largest one over all requests, layers and heads, not a mean over them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from uncomp.eval.bench import gpu_checks_step as step
from uncomp.eval.bench.gpu_cases import FP8, LLAMA, TOY, Case, Shape, checked_case
from uncomp.eval.bench.gpu_timing import row
from uncomp.eval.bench.rows import Row
from uncomp.kernels.compact import naive as compact_naive
from uncomp.kernels.compact.launch import compact, scratch_bytes
from uncomp.kernels.decode import DecodeWorkspace, decode, decode_reference, plan, programs
from uncomp.kernels.entropy import MEASURES, spectrum, truncated_entropy
from uncomp.kernels.entropy.launch import renyi2_entropy, spectral_entropy
from uncomp.kernels.gram import gram
from uncomp.kernels.gram.launch import GramBuffers, covariance, gram_paged
from uncomp.kernels.paged import gather, head_lengths, sub_blocks
from uncomp.kernels.record.launch import record
from uncomp.kernels.select import ema_pool, max_pool, top_entries
from uncomp.kernels.select.launch import Terms, choose, entry_places, limits, pool
from uncomp.kernels.window_scores import Over, window_scores
from uncomp.kernels.window_scores.launch import window_scores_paged
from uncomp.spans import SENTENCE, WORD, places

WINDOW, SINKS, POOLING = 8, 4, 15
#: what went wrong, how large it may be and why
Finding = tuple[str, float, float]
NAN = float("nan")


def cases(device: torch.device, dry: bool) -> dict[str, Case]:
    """By name: head sizes, dtypes and layouts; small enough for the references."""
    if dry:
        lengths: list[int] = [1, 40, 75]
        compacted: list[tuple[int, int] | None] = [None, None, (2, 4)]
        wanted = [(TOY, torch.bfloat16, "NHD"), (TOY, FP8, "HND")]
    else:
        lengths = [1, 17, 700, 4096, 5003, 9001]
        compacted = [None, None, None, (24, 256), (100, 312), None]
        small = Shape(2, LLAMA.heads, LLAMA.group, LLAMA.size)
        wanted = [
            (small, torch.bfloat16, "NHD"),
            (small, FP8, "NHD"),
            (small, torch.bfloat16, "HND"),
            (Shape(2, 3, 7, 64), torch.float16, "NHD"),
            (Shape(2, 4, 2, 256), torch.bfloat16, "NHD"),
        ]
    made = {}
    for shape, dtype, layout in wanted:
        name = f"{shape}, {str(dtype).removeprefix('torch.')}, {layout}"
        made[name] = checked_case(shape, lengths, compacted, dtype, layout, device)
    shape, dtype, layout = wanted[0]
    shape = replace(shape, layers=3)
    lengths, compacted = [*lengths, 100], [*compacted, None]
    name = f"{shape}, {str(dtype).removeprefix('torch.')}, {layout}, layers share"
    made[name] = checked_case(shape, lengths, compacted, dtype, layout, device, shared=True)
    return made


def bench(device: torch.device, dry: bool, say: Callable[[str], None]) -> list[Row]:
    """All checks; a check that raises is a row whose value is NaN."""
    rows: list[Row] = []
    for name, case in cases(device, dry).items():
        for check in CHECKS:
            what = check.__name__.removeprefix("check_")
            try:
                findings = check(case)
            except Exception as error:
                say(f"{what}, {name}: {type(error).__name__}: {error}")
                findings = [(f"{what}: {type(error).__name__}", NAN, 0.0)]
            for metric, value, most in findings:
                rows.append(row(name, metric, "", [value], most=most))
                if rows[-1].verdict != "ok":
                    say(f"WRONG: {name}: {metric} {value:g}, allowed {most:g}")
    return rows


def check_gram(case: Case) -> list[Finding]:
    """Trace-one covariances; products are of bf16 parts, 2^-14 each, fewer in a sum."""
    out = _grams(case)
    got = covariance(out, torch.full_like(out.outer, NAN)).double()
    stride = _stride(case)
    worst = 0.0
    for layer, request in _each(case):
        keys, _, lengths = gather(case.caches, case.rows, case.holdings, request, layer)
        want = gram(keys, lengths, int(stride[request])).covariance()
        error = _norm(got[layer, request] - want) / _norm(want).clamp_min(1e-3)
        worst = step.worse(worst, error)
    return [("gram: error of a covariance", worst, 2.0**-12)]


def check_entropy(case: Case) -> list[Finding]:
    """All measures against a float64 eigen-solver."""
    size = case.shape.size
    matrices = covariance(_grams(case)).view(-1, size, size)
    if case.device.type == "cpu":
        matrices = matrices[::4]  # the interpreter takes a third of a second for each
    decay = torch.arange(1, size + 1, device=case.device) ** -1.5
    rotation = torch.linalg.qr(_normal(case, size, size)).Q
    matrices = torch.cat([matrices, ((rotation * decay) @ rotation.T)[None]])
    eigenvalues = spectrum(matrices.cpu())
    worst = 0.0
    for measure in MEASURES:
        out = torch.full((len(matrices),), NAN, device=case.device)
        spectral_entropy(matrices, None, measure, out=out)  # type: ignore[arg-type]
        want = truncated_entropy(eigenvalues, None, measure)  # type: ignore[arg-type]
        worst = step.worse(worst, (out.cpu().double() - want).abs())
    squares = eigenvalues.square().sum(1)
    order2 = renyi2_entropy(matrices).cpu().double() + squares.log() / math.log(size)
    return [
        # float32 rounding of eigenvalues, where λ ln λ is steep
        ("entropy: error", worst, 1e-5),
        ("entropy: error of Rényi-2", float(order2.abs().max()), 1e-5),
    ]


def check_scores(case: Case) -> list[Finding]:
    """Relative, for probabilities above 1e-6; float32 exponentials of logits up to about 20."""
    shape, caches = case.shape, case.caches
    requests = case.rows.lengths.shape[0]
    tokens = shape.layers * requests * WINDOW
    queries = case.queries(tokens).view(shape.layers, requests, WINDOW, -1, shape.size)
    held = head_lengths(case.rows, case.holdings, shape.block)
    scale = torch.full((shape.layers,), shape.size**-0.5, device=case.device)
    cap = torch.full((shape.layers,), 20.0, device=case.device)
    worst = 0.0
    ways: tuple[tuple[Tensor | None, Over], ...] = ((None, "sum"), (cap, "sum"), (None, "max"))
    for softcap, over in ways:
        size = (shape.layers, requests, shape.heads, int(held.max()))
        out = torch.full(size, NAN, device=case.device)
        window_scores_paged(
            caches, case.rows, case.holdings, queries, scale, softcap, "sum", out,
            over=over,
        )  # fmt: skip
        for layer, request in _each(case):
            keys, _, lengths = gather(caches, case.rows, case.holdings, request, layer)
            entry = torch.arange(keys.shape[1], device=case.device)
            grouped = queries[layer, request].double().unflatten(1, (shape.heads, -1))
            want = window_scores(
                grouped.permute(1, 2, 0, 3), keys.double(), lengths,
                entry - lengths[:, None] + WINDOW, torch.arange(WINDOW, device=case.device),
                shape.size**-0.5, 0.0 if softcap is None else 20.0, over=over,
            )  # fmt: skip
            got = out[layer, request, :, : keys.shape[1]].double()
            error = (got - want).abs() / (want + 1e-6)
            worst = step.worse(worst, error[entry < lengths[:, None]])
    return [("window scores: relative error", worst, 1e-3)]


def _standing(case: Case) -> Tensor:
    """[R, T] int32, where every position stands: random words and sentences."""
    odd, longest = random.Random(1), int(case.rows.lengths.max())
    rows = [
        places(bytes(odd.choices((0, WORD, SENTENCE), (6, 12, 1), k=longest)), longest)
        for _ in range(len(case.rows.lengths))
    ]
    return torch.from_numpy(np.stack(rows)).to(case.device)


def check_select(case: Case) -> list[Finding]:
    """Numbers, pooled scores and chosen entries are the reference's, ties included."""
    terms, raw, pooled, counts, offsets, chosen = chosen_entries(case)
    eligible, forced = limits(terms)
    handed_on = pool(raw, terms, POOLING, torch.full_like(raw, NAN), "ema")
    standing = _standing(case)
    at = entry_places(standing, terms, torch.zeros(raw.shape, dtype=torch.int32, device=raw.device))
    by_word = pool(raw, terms, POOLING, torch.full_like(raw, NAN), "word", at)
    different, worst = 0, 0.0
    for layer, request in _each(case):
        lengths = head_lengths(case.rows, case.holdings, case.shape.block)[layer, request]
        n = int(lengths.max())
        positions = head_positions(case, layer, request, n)
        valid = torch.arange(n, device=case.device) < lengths[:, None]
        length, full = int(case.rows.lengths[request]), int(terms.full[request])
        stay = valid & (positions < full * case.shape.block)
        recent = positions >= length - WINDOW
        must = stay & (recent | (positions < SINKS))
        for start, end in terms.protect[request].tolist():
            must |= stay & (positions >= start) & (positions < end)
        different += int((eligible[layer, request] != stay.sum(1)).sum())
        different += int((forced[layer, request] != must.sum(1)).sum())
        scores = raw[layer, request, :, :n]
        want = max_pool(scores, POOLING, (valid & ~recent).sum(1))
        got = pooled[layer, request, :, :n]
        different += int(((got != want) & valid).sum())
        want_sum = ema_pool(scores.double(), POOLING, (valid & ~recent).sum(1))
        error = (handed_on[layer, request, :, :n] - want_sum).abs() / (want_sum + 1e-6)
        worst = step.worse(worst, error[valid & ~recent])
        stand = standing[request][positions.clamp(0, standing.shape[1] - 1)]
        different += int(((at[layer, request, :, :n] != stand) & valid).sum())
        want_sum = ema_pool(scores.double(), POOLING, (valid & ~recent).sum(1), stand)
        error = (by_word[layer, request, :, :n] - want_sum).abs() / (want_sum + 1e-6)
        worst = step.worse(worst, error[valid & ~recent])
        keep = counts[layer, request].long() * case.shape.block
        best = top_entries(want, scores, stay, must, keep)
        for head in range(case.shape.heads):
            start = int(offsets[layer, request, head]) * case.shape.block
            end = start + int(keep[head])
            wanted = best[head][: end - start]
            different += int((chosen[layer, request, start:end] != wanted).sum())
    return [
        ("selection: different numbers", float(different), 0.0),
        ("selection: relative error of the moving average", worst, 1e-4),
    ]


def check_compact(case: Case) -> list[Finding]:
    """Bytes of the caches and positions after the move; `check_shared` where layers share."""
    if case.holdings.shared:
        return []
    shape, rows = case.shape, case.rows
    terms, _, _, counts, offsets, chosen = chosen_entries(case)
    kept = -(-counts.sum(2).amax(0) // shape.heads)
    width = max(int(kept.max()), 1)
    columns = (terms.full - kept)[:, None] + torch.arange(width, device=case.device)
    columns = columns.clamp(0, rows.blocks.shape[1] - 1)
    blocks = rows.blocks.gather(1, columns.long()).contiguous()
    want, got = case.clone(), case.clone()
    rest = (rows, case.holdings, chosen, counts, offsets, blocks, kept.to(torch.int32))
    compact_naive.compact(want.caches, want.positions, *rest)
    size = scratch_bytes(case.caches, len(rows.lengths), width)
    scratch = torch.full((size,), 255, dtype=torch.uint8, device=case.device)
    compact(got.caches, got.positions, *rest, scratch)
    different = int((got.positions != want.positions).sum())
    for mine, its, before in zip(
        got.caches.tensors, want.caches.tensors, case.caches.tensors, strict=True
    ):
        different += int((mine.view(torch.uint8) != its.view(torch.uint8)).sum())
        if torch.equal(its.view(torch.uint8), before.view(torch.uint8)):
            raise AssertionError("the reference moved nothing")
    return [("compaction: different bytes", float(different), 0.0)]


def check_decode(case: Case) -> list[Finding]:
    """Relative error of an output vector: bf16 weights and outputs, 2^-9 each."""
    shape, device = case.shape, case.device
    requests = len(case.rows.lengths)
    found = 0.0
    for most, softcap in ((1, 0.0), (3, 30.0)):
        # The last row is padding; where several tokens may come, one row has them.
        tokens = [1] * (requests - 1) + [0]
        tokens[1] = most
        starts = torch.tensor([0, *tokens], dtype=torch.int32).cumsum(0).to(torch.int32).to(device)
        workspace = DecodeWorkspace.empty(
            layers=shape.layers, rows=requests + 2, heads=shape.heads, group=shape.group,
            head_size=shape.size, programs=programs(device), device=device, query_tokens=most,
        )  # fmt: skip
        plan(workspace, case.rows, starts, case.holdings, shape.block)
        query = case.queries(sum(tokens))
        sinks = _normal(case, query.shape[1]) if softcap else None
        rest = (starts, case.rows, case.holdings, shape.size**-0.5, softcap, sinks)
        for layer in range(shape.layers):
            out = torch.full_like(query, NAN)
            decode(workspace, case.caches, layer, query, out, *rest)
            want = decode_reference(case.caches, layer, query, *rest)
            found = step.worse(found, step.relative(out, want))
    return [("decode: relative error", found, 1e-2)]


def check_record(case: Case) -> list[Finding]:
    """Bytes of remembered queries, and the count of executions."""
    query = case.queries(5)
    layers = case.shape.layers
    store = torch.full((4, layers, *query.shape[1:]), NAN, dtype=query.dtype, device=case.device)
    places = [store[2].data_ptr(), 0, store[0].data_ptr(), 0, 0]
    executions = torch.zeros(layers, dtype=torch.int64, device=case.device)
    record(query, torch.tensor(places, device=case.device), executions, layers - 1)
    want = torch.full_like(store, NAN)
    want[2, layers - 1], want[0, layers - 1] = query[0], query[2]
    wrong = (store.view(torch.uint8) != want.view(torch.uint8)).sum()
    counted = [0] * (layers - 1) + [1]
    return [
        ("record: different bytes", float(wrong), 0.0),
        ("record: wrong counts", float(executions.tolist() != counted), 0.0),
    ]


def chosen_entries(case: Case) -> tuple[Terms, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Limits, pooling and choice over scores with many ties.

    Returns:
        terms, raw and pooled `[L, R, H, N]`, counts and offsets `[L, R, H]`, chosen `[L, R, K]`.
    """
    shape, device = case.shape, case.device
    held = head_lengths(case.rows, case.holdings, shape.block)
    protect = torch.tensor([[[20, 23], [0, 0]]], dtype=torch.int32, device=device)
    terms = Terms(
        case.rows, case.holdings, case.positions, case.rows.lengths // shape.block,
        protect.expand(len(case.rows.lengths), -1, -1).contiguous(), SINKS, WINDOW,
    )  # fmt: skip
    eligible, forced = limits(terms)
    random = torch.Generator(device).manual_seed(3)
    size = (*held.shape, int(held.max()))
    raw = (torch.rand(size, generator=random, device=device) * 40).floor()
    pooled = pool(raw, terms, POOLING, torch.full_like(raw, NAN))
    least, most = -(-forced // shape.block), eligible // shape.block
    share = torch.rand(held.shape, generator=random, device=device) * 0.6
    counts = torch.minimum(torch.maximum((most * share).to(torch.int32), least), most)
    offsets = (counts.cumsum(2) - counts).to(torch.int32)
    width = max(int(counts.sum(2).max()) * shape.block, 1)
    out = torch.full((*held.shape[:2], width), -7, dtype=torch.int32, device=device)
    return terms, raw, pooled, counts, offsets, choose(raw, pooled, terms, counts, offsets, out)


def head_positions(case: Case, layer: int, request: int, entries: int) -> Tensor:
    """`[H, entries]` int64, position of every entry."""
    block, slot = case.shape.block, int(case.rows.slots[request])
    heads = torch.arange(entries, device=case.device).expand(case.shape.heads, -1).clone()
    if slot < 0:
        return heads
    full = int(case.holdings.spans[slot, 1])
    for head, count in enumerate(case.holdings.counts[layer, slot].tolist()):
        at = sub_blocks(case.rows, case.holdings, request, layer, head, count)
        heads[head] += (full - count) * block
        kept = case.positions[at.unbind(1)].flatten()
        heads[head, : len(kept)] = kept.long()
    return heads


def _grams(case: Case) -> GramBuffers:
    shape = case.shape
    size = (shape.layers, len(case.rows.lengths), shape.heads, shape.size)
    out = GramBuffers.empty(*size, case.device)
    for tensor in (out.shift, out.outer, out.total):
        tensor.fill_(NAN)
    return gram_paged(case.caches, case.rows, case.holdings, _stride(case), out)


def _stride(case: Case) -> Tensor:
    return (1 + case.rows.lengths // 4096).to(torch.int32)


def _each(case: Case) -> list[tuple[int, int]]:
    return [(la, r) for la in range(case.shape.layers) for r in range(len(case.rows.lengths))]


def _normal(case: Case, *shape: int) -> Tensor:
    random = torch.Generator(case.device).manual_seed(9)
    return torch.randn(shape, generator=random, device=case.device)


def _norm(matrices: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrices)


CHECKS: list[Callable[[Case], list[Finding]]] = [
    check_gram,
    check_entropy,
    check_scores,
    check_select,
    check_compact,
    check_decode,
    check_record,
    step.check_graph,
    step.check_pipeline,
    step.check_shared,
    step.check_waiting,
]
