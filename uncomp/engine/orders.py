"""What the scheduler tells the worker with each step, and what the worker answers. No vLLM here.

Both travel as an extra attribute (``ATTRIBUTE``) of vLLM's own messages, which are pickled.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from uncomp.config import UncompConfig

ATTRIBUTE = "uncomp"


@dataclass(frozen=True)
class Order:
    """Compact one request after this step's forward pass.

    Attributes:
        request_id: vLLM's request id.
        num_tokens: tokens computed once this step has run.
        full_blocks: full blocks among them; later blocks stay as they are.
        kept_blocks: ids of the blocks that receive the survivors; they replace the blocks at
            ``[full_blocks - len(kept_blocks), full_blocks)`` and belong to this request alone.
        generation: 1 for the first compaction since the request was (re)scheduled, then 2, 3, ...
        protect: half-open spans of positions that must survive.
        own: settings of the request's own policy; ``None`` = the server's.
        gaps: what every token begins, one byte each, see `uncomp.spans`; empty: not asked for.
    """

    request_id: str
    num_tokens: int
    full_blocks: int
    kept_blocks: tuple[int, ...]
    generation: int
    protect: tuple[tuple[int, int], ...] = ()
    own: UncompConfig | None = None
    gaps: bytes = b""

    @property
    def first_kept(self) -> int:
        """Index in the request's block row of the first block that stays."""
        return self.full_blocks - len(self.kept_blocks)

    def forced_tokens(self, sinks: int, recent: int, block_size: int) -> int:
        """Tokens of the full blocks that every head keeps in any case.

        Args:
            sinks, recent: first and last tokens of the sequence that stay.
        """
        limit = self.full_blocks * block_size
        number = end = 0
        for start, stop in sorted([(0, sinks), (self.num_tokens - recent, limit), *self.protect]):
            start, stop = max(start, end), min(stop, limit)
            if start < stop:
                number += stop - start
                end = stop
        return number


@dataclass(frozen=True)
class Pruning:
    """Read one prompt, all of it in this step, with fewer tokens from stage to stage of layers.

    Attributes:
        request_id: vLLM's request id.
        num_tokens: of the prompt.
        kept: tokens that enter each stage after the first.
        protect: half-open spans of positions that go on in any case.
        own: settings of the request's own policy; ``None`` = the server's.
        gaps: as in `Order`.
    """

    request_id: str
    num_tokens: int
    kept: tuple[int, ...]
    protect: tuple[tuple[int, int], ...] = ()
    own: UncompConfig | None = None
    gaps: bytes = b""


@dataclass
class StepPlan:
    """Sent with every step.

    Attributes:
        orders: compactions to run after the forward pass.
        record: request id → (first position whose query is recorded for a coming compaction, tokens
            computed once this step has run).
        generations: compressed requests of this step → how often they were compacted (0: only
            pruned). The worker refuses to run a step when its own state disagrees.
        prunings: prompts that are pruned in this step.
        queries_needed: requests among them whose queries a compaction needs, now or soon.
    """

    orders: list[Order] = field(default_factory=list)
    record: dict[str, tuple[int, int]] = field(default_factory=dict)
    generations: dict[str, int] = field(default_factory=dict)
    prunings: list[Pruning] = field(default_factory=list)
    queries_needed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Receipt:
    """One order that has been run.

    Attributes:
        request_id, generation: which order.
        tokens_seen: cached tokens before, summed over layers and KV heads of this rank.
        tokens_kept: cached tokens after, the same sum.
        score_seconds, move_seconds: wall time spent choosing and moving.
        heads: KV heads of all layers of this rank.
    """

    request_id: str
    generation: int
    tokens_seen: int
    tokens_kept: int
    score_seconds: float
    move_seconds: float
    heads: int


@dataclass(frozen=True)
class PruningReceipt:
    """Prompts have been pruned.

    Attributes:
        choose_seconds: spent choosing which tokens go on, as far as the device has passed it: of
            this step's prompts or of earlier ones.
    """

    choose_seconds: float
