"""Times of a compaction against the prefill of the same prompt, and of ways to the entropy."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from uncomp.config import UncompConfig
from uncomp.engine.settings import make_policy
from uncomp.eval.bench import gpu_compactor, gpu_prefill
from uncomp.eval.bench.gpu_cases import LLAMA, TOY, Case, Shape, timed_case
from uncomp.eval.bench.gpu_prefill import LLAMA_WIDTHS, TOY_WIDTHS, Widths
from uncomp.eval.bench.gpu_timing import Timer, Work, median, row
from uncomp.eval.bench.rows import Row
from uncomp.kernels.compact.launch import compact, scratch_bytes
from uncomp.kernels.entropy import spectrum, truncated_entropy
from uncomp.kernels.entropy.launch import Scratch, renyi2_entropy, spectral_entropy
from uncomp.kernels.gram.launch import GramBuffers, covariance, gram_paged
from uncomp.kernels.select import Pooling
from uncomp.kernels.select.launch import Terms, choose, entry_places, limits, pool
from uncomp.kernels.window_scores import Over
from uncomp.kernels.window_scores.launch import window_scores_paged, workspace_size
from uncomp.spans import places


@dataclass(frozen=True)
class Sizes:
    """One prompt. Attributes: keep: ratios; prefills: timed runs of the stack."""

    shape: Shape
    widths: Widths
    tokens: int
    keep: tuple[float, ...]
    prefills: int


REAL = Sizes(LLAMA, LLAMA_WIDTHS, 32768, (0.0474, 0.5), 20)
DRY = Sizes(TOY, TOY_WIDTHS, 96, (0.5,), 1)


def bench(timer: Timer, dry: bool, say: Callable[[str], None]) -> Iterator[list[Row]]:
    """Prefill, compaction as a whole and by stage, entropy."""
    sizes = DRY if dry else REAL
    say(f"prefill of {sizes.tokens} tokens, {sizes.shape.layers} layers")
    prefill, rows = prefill_rows(timer, sizes)
    yield rows
    shape, tokens = sizes.shape, sizes.tokens
    case = timed_case(shape, [tokens], [None], torch.bfloat16, "NHD", timer.device)
    for keep in sizes.keep:
        say(f"compaction of {tokens} tokens, keep {keep}")
        yield compaction_rows(timer, case, UncompConfig(keep=keep, min_tokens=1), prefill)
    say(f"compaction of {tokens} tokens, shares by entropy")
    by_entropy = UncompConfig(keep=sizes.keep[0], policy="entropy", min_tokens=1)
    yield compaction_rows(timer, case, by_entropy, prefill)
    del case
    case = timed_case(shape, [tokens], [None], torch.bfloat16, "NHD", timer.device, shared=True)
    say(f"compaction of {tokens} tokens, layers share")
    sharing = UncompConfig(keep=sizes.keep[0], min_tokens=1, shares="pyramid")
    yield compaction_rows(timer, case, sharing, prefill)
    del case
    say("entropy: library eigen-solver, own kernel, Rényi-2")
    yield entropy_rows(timer, sizes.shape)


def prefill_rows(timer: Timer, sizes: Sizes) -> tuple[float, list[Row]]:
    """Seconds of one prompt through all layers, and the row."""
    stack = gpu_prefill.Stack(sizes.shape, sizes.widths, sizes.tokens, timer.device)
    few = Timer(timer.device, sizes.prefills, 2 if timer.cuda else 0)
    seconds = [s * stack.times for s in few.times(prefill=stack.run)["prefill"]]
    setting = f"prefill of {sizes.tokens} tokens, {sizes.shape.layers} layers{stack.note}"
    found = _millis(setting, "time", seconds)
    del stack
    gc.collect()
    if timer.cuda:
        torch.cuda.empty_cache()
    return median(seconds), [found]


def compaction_rows(timer: Timer, case: Case, config: UncompConfig, prefill: float) -> list[Row]:
    """The engine's own compaction, and each stage of it alone as a graph."""
    shape, tokens = case.shape, int(case.rows.lengths[0])
    setting = f"compaction of {tokens} tokens, {shape.layers} layers, keep {config.keep}"
    setting += "" if config.policy == UncompConfig(keep=1.0).policy else f", {config.policy}"
    setting += ", layers share" * case.holdings.shared
    bytes_ = gpu_compactor.arena_bytes(timer.device)
    engine = gpu_compactor.compactor(case, config, bytes_)
    jobs = gpu_compactor.jobs(case, config, [0])

    def work() -> None:
        engine.run(jobs, case.rows.blocks)

    def before() -> None:
        gpu_compactor.forget(engine, [0])

    seconds = timer.prepared({"all": (work, before)})["all"]
    share = [100 * s / prefill for s in seconds]
    found = [
        _millis(setting, "time", seconds),
        _millis(setting, "time until the host goes on", timer.host(work, before)),
        row(setting, "share of the prefill", "%", share, most=2.0),
    ]
    if case.holdings.shared:
        return found
    stages = Stages(case, config).by_name()
    taken = timer.times(**{name: timer.graph(stage) for name, stage in stages.items()})
    found += [_millis(setting, f"stage {name}", s) for name, s in taken.items()]
    total = sum(median(s) for s in taken.values())
    return [*found, _millis(setting, "sum of the stages", [total])]


class Stages:
    """The launches of a first compaction of one request, all layers in each."""

    def __init__(self, case: Case, config: UncompConfig) -> None:
        shape, device = case.shape, case.device
        tokens = int(case.rows.lengths[0])
        layers, heads, size = shape.layers, shape.heads, shape.size
        self.case, self.config, self.policy = case, config, make_policy(config)
        [job] = gpu_compactor.jobs(case, config, [0])
        order = job.order
        assert job.queries is not None
        self.queries = job.queries.unsqueeze(1)
        self.scale = torch.full((layers,), size**-0.5, device=device)
        self.blocks = _int([order.kept_blocks], device)
        self.kept, full = _int([len(order.kept_blocks)], device), _int([order.full_blocks], device)
        stride = max(1, -(-tokens // config.online_tokens))
        self.stride = _int([stride], device)
        self.terms = Terms(
            case.rows, case.holdings, case.positions, full,
            torch.zeros(1, 0, 2, dtype=torch.int32, device=device), config.sinks, config.window,
        )  # fmt: skip
        self.grams = GramBuffers.empty(layers, 1, heads, size, device)
        self.matrices = torch.empty(layers * heads, size, size, device=device)
        self.scratch = Scratch.empty(layers * heads, size, device)
        self.entropies = torch.empty(layers * heads, device=device)
        self.raw = torch.empty(layers, 1, heads, tokens, device=device)
        self.pooled = torch.empty_like(self.raw)
        self.places = torch.empty(self.raw.shape, dtype=torch.int32, device=device)
        self.standing = torch.from_numpy(places(order.gaps, tokens)).to(device).unsqueeze(0)
        needed = workspace_size(layers, 1, heads * shape.group, config.window, tokens)
        self.workspace = torch.empty(needed, device=device)
        self.eligible = torch.empty(layers, 1, heads, dtype=torch.int32, device=device)
        self.forced = torch.empty_like(self.eligible)
        width = len(order.kept_blocks) * heads * shape.block
        self.chosen = torch.empty(layers, 1, width, dtype=torch.int32, device=device)
        moved = scratch_bytes(case.caches, 1, len(order.kept_blocks), layers)
        self.moving = torch.empty(moved, dtype=torch.uint8, device=device)
        self.counts, self.offsets = (torch.zeros_like(self.eligible) for _ in range(2))
        # The later stages read what the earlier ones leave: run each once, in order.
        for stage in self.by_name().values():
            stage()

    def by_name(self) -> dict[str, Work]:
        measured = {"Gram": self.gram, "covariance": self.covariance, "entropy": self.entropy}
        return {
            **(measured if self.policy.needs_entropy else {}),
            "window scores": self.scores,
            "limits": self.limits,
            "pooling": self.pool,
            "shares": self.share,
            "choice": self.choose,
            "moving": self.move,
        }

    def gram(self) -> None:
        case = self.case
        gram_paged(case.caches, case.rows, case.holdings, self.stride, self.grams)

    def covariance(self) -> None:
        covariance(self.grams, self.matrices.view(self.grams.outer.shape))

    def entropy(self) -> None:
        spectral_entropy(
            self.matrices, self.config.truncation, "renormalized", self.scratch, self.entropies
        )

    def scores(self) -> None:
        case = self.case
        window_scores_paged(
            case.caches, case.rows, case.holdings, self.queries, self.scale, None, "sum", self.raw,
            self.workspace, over=cast(Over, self.config.window_reduce),
        )  # fmt: skip

    def limits(self) -> None:
        limits(self.terms, self.eligible, self.forced)

    def pool(self) -> None:
        kind = cast(Pooling, self.config.pooling_kind)
        at = entry_places(self.standing, self.terms, self.places) if kind == "word" else None
        pool(self.raw, self.terms, self.config.pooling, self.pooled, kind, at)

    def share(self) -> None:
        case, size = self.case, self.case.shape.block
        total = (self.kept.long() * case.shape.heads).expand(case.shape.layers, -1)
        mask = None
        if self.policy.deals_by_score:
            entry = torch.arange(self.raw.shape[-1], device=case.device)
            mask = entry < self.eligible.unsqueeze(-1)
        counts = self.policy.share(
            self.entropies.view(self.eligible.shape), self.pooled, mask, total,
            -(-self.forced.long() // size), self.eligible.long() // size, size,
        )  # fmt: skip
        # In place: graphs of other stages read them.
        self.counts.copy_(counts)
        self.offsets.copy_(counts.cumsum(-1) - counts)

    def choose(self) -> None:
        choose(self.raw, self.pooled, self.terms, self.counts, self.offsets, self.chosen)

    def move(self) -> None:
        case = self.case
        compact(
            case.caches, case.positions, case.rows, case.holdings, self.chosen, self.counts,
            self.offsets, self.blocks, self.kept, self.moving,
        )  # fmt: skip


def entropy_rows(timer: Timer, shape: Shape) -> list[Row]:
    """All heads of a model at once: time and error against float64."""
    heads, size = shape.layers * shape.heads, shape.size
    setting = f"entropy of {heads} heads, d {size}"
    random = torch.Generator(timer.device).manual_seed(0)
    drawn = torch.randn(heads, 4 * size, size, generator=random, device=timer.device)
    # Spectra like those of keys: a few strong directions, a long tail; different in every head.
    power = torch.linspace(0.3, 1.5, heads, device=timer.device)[:, None]
    index = torch.arange(1, size + 1, device=timer.device)
    drawn *= (index ** -(power / 2))[:, None]
    matrices = drawn.transpose(1, 2) @ drawn
    matrices /= matrices.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]
    matrices = ((matrices + matrices.transpose(1, 2)) / 2).contiguous()
    scratch, out = Scratch.empty(heads, size, timer.device), torch.empty(heads, device=timer.device)
    eigenvalues = spectrum(matrices.cpu())
    full = truncated_entropy(eigenvalues, measure="full").to(timer.device)
    wanted = truncated_entropy(eigenvalues, measure="renormalized").to(timer.device)

    def library() -> Tensor:
        values = torch.linalg.eigvalsh(matrices).flip(-1).clamp_min(0.0)
        values = values / values.sum(-1, keepdim=True)
        return truncated_entropy(values, measure="renormalized")

    def own() -> Tensor:
        return spectral_entropy(matrices, None, "renormalized", scratch, out)

    def order2() -> Tensor:
        return renyi2_entropy(matrices)

    sides: dict[str, Work] = {"eigvalsh": library, "own kernel": own, "Rényi-2": order2}
    found = [_millis(setting, f"{k}: time", v) for k, v in timer.times(**sides).items()]
    found += [_millis(setting, f"{k}: until the host goes on", timer.host(work, _nothing))
              for k, work in sides.items()]  # fmt: skip
    for name, got, want in (
        ("eigvalsh", library(), wanted),
        ("own kernel", own(), wanted),
        ("Rényi-2", order2(), full),
    ):
        error = float((got.double() - want).abs().max())
        agreement = _rank_agreement(got.double(), wanted)
        found.append(row(setting, f"{name}: largest difference", "", [error]))
        found.append(row(setting, f"{name}: rank correlation", "", [agreement]))
    return found


def _rank_agreement(left: Tensor, right: Tensor) -> float:
    """Spearman's coefficient."""
    ranks = torch.stack([t.argsort().argsort().double() for t in (left, right)])
    return float(torch.corrcoef(ranks)[0, 1])


def _millis(setting: str, metric: str, seconds: list[float]) -> Row:
    return row(setting, metric, "ms", [1e3 * s for s in seconds])


def _int(values: object, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _nothing() -> None:
    pass
