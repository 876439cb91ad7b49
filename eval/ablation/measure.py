"""What a policy costs one sample: its answer against the answer with the full cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uncomp.eval.ablation.replay import Reading, Replay


@dataclass(frozen=True)
class Case:
    """A prompt and the answer that is followed.

    Attributes:
        reading: of the prompt, up to where it is compressed.
        rest: tokens of the prompt after that.
        answer: tokens of the full cache's own answer, or the text of a likelihood task.
        skip: tokens of the answer that are not scored.
        spans: for every right reference that the full cache's answer has, its tokens `[a, b)`.
        full: score of the full cache's answer, 0..1; None if there is none.
        best: whether one of the references is enough.
    """

    reading: Reading
    rest: tuple[int, ...]
    answer: tuple[int, ...]
    skip: int = 0
    spans: tuple[tuple[int, int], ...] = ()
    full: float | None = None
    best: bool = False

    @property
    def fed(self) -> tuple[int, ...]:
        return (*self.rest, *self.answer[:-1])

    @property
    def known(self) -> int:
        """Answer tokens that the prompt's own pass predicted, before anything was dropped."""
        return 0 if self.rest else 1


def reference_spans(
    tokenizer: Any, answer: Sequence[int], references: Sequence[str]
) -> list[tuple[int, int]]:
    """Tokens of an answer that contain its first occurrence of each reference it has."""
    ends = [len(tokenizer.decode(list(answer[: i + 1]))) for i in range(len(answer))]
    text = tokenizer.decode(list(answer)).lower()
    spans = []
    for reference in references:
        start = text.find(reference.lower())
        if start < 0:
            continue
        end = start + len(reference)
        first = next(i for i, at in enumerate(ends) if at > start)
        last = next(i for i, at in enumerate(ends) if at >= end)
        spans.append((first, last + 1))
    return spans


def measure(
    replay: Replay, case: Case, kept: Tensor, full_logits: Tensor
) -> list[dict[str, float]]:
    """KL, agreement and estimated score of each policy in `kept` `[V, L, H, N]`."""
    count = len(case.answer) - case.known
    logits = replay.follow(case.reading, kept, case.fed, count)
    skip = max(0, case.skip - case.known)
    found = []
    reference = full_logits[skip:].log_softmax(-1)
    best = torch.tensor(case.answer[case.known :])
    for one in logits:
        other = one[skip:].log_softmax(-1)
        kl = (reference.exp() * (reference - other)).sum(-1).mean()
        top = (other.argmax(-1) == reference.argmax(-1)).float().mean()
        row = {"kl": float(kl), "top1": float(top)}
        if case.full is not None:
            right = [True] * case.known + (one.argmax(-1) == best).tolist()
            row["score"] = (case.full or 0.0) * share_said(right, case.spans, case.best)
        found.append(row)
    return found


def signs(attention: Tensor, kept: Tensor, entropy: Tensor) -> dict[str, float]:
    """What is known of a loss when a prompt is compressed, before any answer.

    Args:
        attention: `[L, H, N]`, sum of what the last queries pay to each token.
        kept: `[L, H, N]` bool.
        entropy: `[L, H]`, of the heads' keys.

    Returns:
        ``missed``: share of the attention that goes to what is dropped, mean over heads;
        ``missed_worst``: of the layer with the largest; ``entropy``: mean over heads.
    """
    missed = 1 - (attention * kept).sum(-1) / attention.sum(-1)
    return {
        "missed": float(missed.mean()),
        "missed_worst": float(missed.mean(1).max()),
        "entropy": float(entropy.mean()),
    }


def share_said(right: Sequence[bool], spans: Sequence[tuple[int, int]], best: bool) -> float:
    """Share of an answer's score that is left, in 0..1: its references that would still be said.

    Args:
        right: of every token of the answer, whether it is still the most probable one.
        spans: of the references that the answer has; none: all tokens count as one.
        best: one of them is enough.
    """
    if not spans:
        return float(all(right))
    said = [all(right[a:b]) for a, b in spans]
    return float(any(said)) if best else sum(said) / len(said)
