"""Checks of what a step is made of: a captured graph, a compaction, and that nothing waits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from uncomp.config import UncompConfig
from uncomp.engine.device_orders import Job
from uncomp.eval.bench import gpu_compactor
from uncomp.eval.bench.gpu_cases import Case
from uncomp.eval.bench.gpu_timing import Timer
from uncomp.kernels.decode import DecodeWorkspace, decode, decode_reference, plan, programs
from uncomp.kernels.entropy import spectrum, truncated_entropy
from uncomp.kernels.gram import gram
from uncomp.kernels.paged import Caches, Rows, gather, read, sub_blocks
from uncomp.kernels.record.launch import record
from uncomp.kernels.select import Pooling, pool_scores, top_entries
from uncomp.kernels.window_scores import Over, window_scores
from uncomp.spans import places

Finding = tuple[str, float, float]
NAN = float("nan")


class Step:
    """Decode attention and remembered queries of all layers over buffers that never move."""

    def __init__(self, case: Case) -> None:
        shape, device = case.shape, case.device
        rows = len(case.rows.lengths)
        self.case, self.layers = case, range(shape.layers)
        self.rows = Rows(
            case.rows.blocks.clone(), case.rows.lengths.clone(), case.rows.slots.clone()
        )
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.workspace = DecodeWorkspace.empty(
            layers=shape.layers, rows=rows, heads=shape.heads, group=shape.group,
            head_size=shape.size, programs=programs(device), device=device,
        )  # fmt: skip
        self.query = torch.stack([case.queries(rows, seed=layer) for layer in self.layers])
        self.out = torch.full_like(self.query, NAN)
        self.store = torch.full_like(self.query, NAN).transpose(0, 1).contiguous()
        self.addresses = torch.zeros(rows, dtype=torch.int64, device=device)
        self.executions = torch.zeros(shape.layers, dtype=torch.int64, device=device)

    def plan(self) -> None:
        plan(
            self.workspace, self.rows, self.starts, self.case.holdings, self.case.shape.block
        )  # fmt: skip

    def forward(self) -> None:
        """What a captured graph holds."""
        case = self.case
        for layer in self.layers:
            record(self.query[layer], self.addresses, self.executions, layer)
            decode(
                self.workspace, case.caches, layer, self.query[layer], self.out[layer],
                self.starts, self.rows, case.holdings, case.shape.size**-0.5,
            )  # fmt: skip

    def error(self) -> float:
        """Of the outputs, against the reference with what the buffers hold now."""
        case, worst = self.case, 0.0
        for layer in self.layers:
            want = decode_reference(
                case.caches, layer, self.query[layer], self.starts, self.rows, case.holdings,
                case.shape.size**-0.5,
            )  # fmt: skip
            worst = worse(worst, relative(self.out[layer], want))
        return worst


def check_graph(case: Case) -> list[Finding]:
    """One capture, replayed for other rows, lengths and remembered places.

    On the CPU nothing is captured, the rest is the same.
    """
    step, rows, replays = Step(case), len(case.rows.lengths), 3
    step.plan()
    replay = Timer(case.device, 1, 0).graph(step.forward)
    step.executions.zero_()
    found, wrong = 0.0, 0.0
    random = torch.Generator().manual_seed(1)
    tail = case.holdings.spans[case.rows.slots.long().clamp_min(0), 1] * case.shape.block
    least = torch.where(case.rows.slots >= 0, tail, 1)
    for turn in range(replays):
        order = torch.randperm(rows, generator=random).to(case.device)
        shorter = torch.maximum(case.rows.lengths - turn, least.to(torch.int32))
        step.rows.blocks.copy_(case.rows.blocks[order])
        step.rows.lengths.copy_(shorter[order])
        step.rows.slots.copy_(case.rows.slots[order])
        step.starts[rows] = rows - turn % 2  # every other replay has a row of padding
        step.out.fill_(NAN)
        step.store.fill_(NAN)
        step.addresses.zero_()
        step.addresses[turn % rows] = step.store[0].data_ptr()
        step.query.copy_(step.query.roll(1, 1))
        step.plan()
        replay()
        found = worse(found, torch.tensor(step.error()))
        want = torch.full_like(step.store, NAN)
        want[0] = step.query[:, turn % rows]
        wrong += float((want.view(torch.uint8) != step.store.view(torch.uint8)).sum())
    counted = [replays] * case.shape.layers
    return [
        ("graph of record and decode: relative error", found, 1e-2),
        ("graph of record and decode: different remembered bytes", wrong, 0.0),
        (
            "graph of record and decode: executions not counted",
            float(step.executions.tolist() != counted),
            0.0,
        ),
    ]


def check_pipeline(case: Case) -> list[Finding]:
    """A whole compaction by the engine's own code, against the references chained.

    Scores that differ by rounding may change the choice between entries of nearly equal score.
    """
    if case.holdings.shared:
        return []
    config = UncompConfig(keep=0.3, policy="entropy", min_tokens=1)
    requests = [
        r
        for r, (slot, n) in enumerate(
            zip(case.rows.slots.tolist(), case.rows.lengths.tolist(), strict=True)
        )
        if slot < 0 and n >= 40
    ]
    before = case.clone()
    after = case.clone()
    device = gpu_compactor.compactor(after, config, gpu_compactor.arena_bytes(case.device))
    jobs = gpu_compactor.jobs(after, config, requests)
    device.run(jobs, after.rows.blocks)
    shares = moved = 0.0
    chosen = different = 0
    for job in jobs:
        slot = device.requests.slots[job.order.request_id].index
        counts = device.requests.holdings.counts[:, slot]
        for layer in range(case.shape.layers):
            wanted, best = _reference(before, config, layer, job)
            shares += float((counts[layer] != wanted).sum())
            kept = _kept(after, layer, job.order.kept_blocks, counts[layer])
            for head, (positions, entries) in enumerate(kept):
                mine, its = set(positions.tolist()), set(best[head][best[head] >= 0].tolist())
                chosen += len(its)
                different += len(its - mine)
                block = before.rows.blocks[job.row][positions.long() // case.shape.block].long()
                place = positions.long() % case.shape.block
                source = before.caches.tensors[layer].view(torch.uint8)[block, head, place]
                moved += float((source != entries).sum())
    return [
        ("compaction by the engine: sub-blocks dealt differently", shares, 0.0),
        ("compaction by the engine: share of other entries", different / max(chosen, 1), 2e-3),
        ("compaction by the engine: different bytes", moved, 0.0),
    ]


def check_shared(case: Case) -> list[Finding]:
    """A compaction of layers that share: every head finds the bytes of the positions it kept."""
    if not case.holdings.shared:
        return []
    config = UncompConfig(keep=0.3, min_tokens=1, shares="pyramid")
    slots, lengths = case.rows.slots.tolist(), case.rows.lengths.tolist()
    requests = [r for r, n in enumerate(lengths) if slots[r] < 0 and n >= 40]
    before, after = case.clone(), case.clone()
    device = gpu_compactor.compactor(after, config, gpu_compactor.arena_bytes(case.device))
    jobs = gpu_compactor.jobs(after, config, requests)
    device.run(jobs, after.rows.blocks)
    holdings, block = device.requests.holdings, case.shape.block
    slot_of = torch.full_like(case.rows.slots, -1)
    for job in jobs:
        slot_of[job.row] = device.requests.index_of(job.order.request_id)
    rows = Rows(case.rows.blocks, case.rows.lengths, slot_of)
    raw = [_raw(after.caches, layer) for layer in range(case.shape.layers)]
    wrong = elsewhere = 0.0
    for job in jobs:
        kept = holdings.counts[:, slot_of[job.row].long()].tolist()
        dealt = sum(map(sum, kept)) - len(job.order.kept_blocks) * case.shape.heads * len(kept)
        wrong += abs(dealt)
        for layer, heads in enumerate(kept):
            for head, count in enumerate(heads):
                at = sub_blocks(rows, holdings, job.row, layer, head, count)
                elsewhere += int((at[:, 0] != layer).sum())
                found = read(raw, at).flatten(0, 1)
                positions = after.positions[at.unbind(1)].flatten().long()
                wrong += float((positions[1:] <= positions[:-1]).sum())
                source = before.rows.blocks[job.row][positions // block].long()
                want = _raw(before.caches, layer)[source, head, positions % block]
                wrong += float((want != found).sum())
    if not elsewhere:
        raise AssertionError("no layer has entries in another layer's cache")
    return [("compaction where layers share: different bytes", wrong, 0.0)]


def check_waiting(case: Case) -> list[Finding]:
    """No step and no compaction waits for the device (raises if one does). CUDA only."""
    if case.device.type != "cuda":
        return []
    shares = "pyramid" if case.holdings.shared else "policy"
    step, config = Step(case), UncompConfig(keep=0.3, min_tokens=1, shares=shares)
    after = case.clone()
    device = gpu_compactor.compactor(after, config, gpu_compactor.arena_bytes(case.device))
    request = int(case.rows.lengths.masked_fill(case.rows.slots >= 0, 0).argmax())
    jobs = gpu_compactor.jobs(after, config, [request])
    for errors in (False, True):  # compiled and warm the first time
        gpu_compactor.forget(device, [request])
        with _no_waiting(errors):
            step.plan()
            step.forward()
            device.run(jobs, after.rows.blocks)
    return [("waits for the device in plan, decode, record and compaction", 0.0, 0.0)]


@contextmanager
def _no_waiting(errors: bool) -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error" if errors else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _reference(case: Case, config: UncompConfig, layer: int, job: Job) -> tuple[Tensor, Tensor]:
    """Sub-blocks `[H]` and entries `[H, K]` that a request not compressed before keeps."""
    from uncomp.engine.settings import make_policy

    assert job.queries is not None
    row, queries, blocks = job.row, job.queries[layer], len(job.order.kept_blocks)
    shape, tokens = case.shape, int(case.rows.lengths[row])
    keys, _, lengths = gather(case.caches, case.rows, case.holdings, row, layer)
    entry = torch.arange(tokens, device=case.device)
    positions = entry.expand(shape.heads, -1)
    grouped = queries.double().unflatten(1, (shape.heads, -1)).permute(1, 2, 0, 3)
    scores = window_scores(
        grouped, keys.double(), lengths, positions, entry[-config.window :], shape.size**-0.5,
        over=cast(Over, config.window_reduce),
    ).float()  # fmt: skip
    stay = positions < tokens // shape.block * shape.block
    recent = positions >= tokens - config.window
    forced = stay & (recent | (positions < config.sinks))
    kind = cast(Pooling, config.pooling_kind)
    at = torch.from_numpy(places(job.order.gaps, tokens)).to(case.device).expand_as(scores)
    pooled = pool_scores(scores, config.pooling, kind, (~recent).sum(1), at)
    stride = max(1, math.ceil(tokens / config.online_tokens))
    eigenvalues = spectrum(gram(keys, lengths, stride).covariance().cpu())
    entropy = truncated_entropy(eigenvalues, config.truncation, "renormalized").to(case.device)
    counts = make_policy(config).share(
        entropy, None, None, torch.tensor(blocks * shape.heads, device=case.device),
        -(-forced.sum(1) // shape.block), stay.sum(1) // shape.block, shape.block,
    )  # fmt: skip
    return counts, top_entries(pooled, scores, stay, forced, counts * shape.block)


def _kept(
    case: Case, layer: int, blocks: tuple[int, ...], counts: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions `[n]` and bytes `[n, 2 d * itemsize]` of what each head kept."""
    at = torch.tensor(blocks, device=case.device)
    places = case.positions[layer, at].flatten(0, 1)
    entries = _raw(case.caches, layer)[at].flatten(0, 1)
    start = 0
    for count in counts.tolist():
        part = slice(start, start + count)
        yield places[part].flatten(), entries[part].flatten(0, 1)
        start += count


def _raw(caches: Caches, layer: int) -> Tensor:
    return caches.tensors[layer].view(torch.uint8)


def relative(got: Tensor, want: Tensor) -> Tensor:
    """Error of every vector over its length; 0 where the reference is NaN and so is `got`."""
    nowhere = want.isnan().all(-1)
    error = (got.double() - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-6)
    both = nowhere & got.isnan().all(-1)
    return torch.where(nowhere, torch.where(both, 0.0, NAN), error)


def worse(worst: float, errors: Tensor) -> float:
    """The largest; NaN once there was one."""
    found = float(errors.max()) if errors.numel() else 0.0
    return max(worst, found) if math.isfinite(found) and math.isfinite(worst) else NAN
