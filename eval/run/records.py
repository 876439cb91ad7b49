"""What the stages hand to each other, one JSON object a line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One way of serving: a method at a keep ratio.

    Attributes:
        method: name in :mod:`uncomp.eval.methods`; ``full`` is the full cache.
        keep: keep ratio asked for; 1.0 for the full cache.
    """

    method: str
    keep: float = 1.0


@dataclass(frozen=True)
class Prediction:
    """What the engine answered to one turn of one sample, and what it held.

    Attributes:
        task, sample, turn: which question.
        case: how it was served.
        text: the answer; "" for likelihood turns.
        prompt_tokens, cut_tokens, output_tokens: counts; cut: context tokens left out to fit.
        kept_tokens, seen_tokens: cached tokens after and before the last compaction, summed over
            layers and KV heads; equal when nothing was dropped. Measured by the engine; None if it
            does not say (a server without the plugin).
        compactions: how often the cache was compacted; None if the engine does not say.
        seconds: from sending to the last token; requests are served together.
        finish: vLLM's finish reason.
        logprobs: for likelihood turns, per forced token: see
            :mod:`uncomp.eval.tasks.likelihood`.
    """

    task: str
    sample: str
    turn: int
    case: Case
    text: str
    prompt_tokens: int
    cut_tokens: int
    output_tokens: int
    kept_tokens: int | None = None
    seen_tokens: int | None = None
    compactions: int | None = None
    seconds: float = 0.0
    finish: str = ""
    logprobs: Any = None


@dataclass(frozen=True)
class Scored:
    """One number for one turn of one sample under one case.

    Attributes:
        task, sample, turn, case: as in :class:`Prediction`.
        metric: what the number is, e.g. ``any_reference`` or ``kl``.
        value: in [0, 1] for answers; nats per token for ``nll`` and ``kl``.
        higher_is_better: False for ``nll``, ``kl`` and leakage.
        keep_measured: kept bytes over full bytes, measured; None if the engine does not say.
        prompt_tokens, cut_tokens, output_tokens: as in :class:`Prediction`.
        facts: the sample's facts (length, depth, ...).
    """

    task: str
    sample: str
    turn: int
    case: Case
    metric: str
    value: float
    higher_is_better: bool = True
    keep_measured: float | None = None
    prompt_tokens: int = 0
    cut_tokens: int = 0
    output_tokens: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
