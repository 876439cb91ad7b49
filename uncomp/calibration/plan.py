"""What would be done with a calibration: budgets of every KV head, and stages of the layers."""

import math
from dataclasses import dataclass

import torch

from uncomp import grouping, policies
from uncomp.calibration.file import Calibration, CalibrationError
from uncomp.config import FLOORS
from uncomp.importance import deal
from uncomp.stages import largest_drops

#: stages of layers, as in the paper's 7B models
STAGES = 5


def stage_starts(calibration: Calibration) -> tuple[int, ...]:
    """First layers of the stages after the first, between which prompt tokens leave.

    The largest drops of the queries' full entropy, the mean of a layer's heads: what the published
    rule sums up, without its threshold per model.
    """
    return largest_drops(calibration.scores("queries", "full").mean(1).tolist(), STAGES)


def plan_shared(
    calibration: Calibration, *, keep: float, tokens: int, block_size: int
) -> list[list[int]] | None:
    """Tokens that every head keeps where all layers share one budget, [layers][KV heads].

    For a prompt of `tokens` tokens kept at ratio `keep`, dealt as on the engine in blocks of
    `block_size` tokens, at least one for each head; None if the file holds no importance.
    """
    if calibration.importance is None:
        return None
    importance = calibration.head_importance()
    least = torch.ones(importance.shares.shape[1:], dtype=torch.int64)
    most = torch.full_like(least, math.ceil(tokens / block_size))
    total = max(round(keep * tokens / block_size), 1) * least.numel()
    counts = deal(importance, total, least, most, FLOORS["calibrated"])
    return (counts * block_size).clamp(max=tokens).tolist()


@dataclass(frozen=True)
class HeadPlan:
    """Per layer and KV head, [layers][KV heads] each: mean entropy, group (0 = lowest), tokens."""

    entropy: list[list[float]]
    groups: list[list[int]]
    tokens: list[list[int]]


def plan_heads(
    calibration: Calibration,
    *,
    source: str,
    measure: str,
    groups: int,
    ratio: float,
    keep: float,
    tokens: int,
    block_size: int,
) -> HeadPlan:
    """Groups and budgets for a prompt of `tokens` tokens kept at ratio `keep`.

    The budgets are dealt by the entropy policy itself, in blocks of `block_size` tokens, at least
    one for each head; the forced entries of a real request may raise a minimum.

    Raises:
        CalibrationError: an argument out of range, or too few blocks for the heads.
    """
    if not 0 < keep <= 1 or tokens < 1 or block_size < 1:
        raise CalibrationError(
            f"keep {keep} must be in (0, 1]; tokens {tokens} and block size {block_size} at least 1"
        )
    scores = calibration.scores(source, measure)
    layers, heads = scores.shape
    available = math.ceil(tokens / block_size)
    # A sub-block is one head's share of a block: `heads` of them make up a kept block.
    total = max(round(keep * tokens / block_size), 1) * heads
    minimum = torch.ones(heads, dtype=torch.int64)
    maximum = torch.full((heads,), available)
    nothing = torch.empty(heads, 0)
    try:
        policy = policies.get("entropy", groups=groups, ratio=ratio)
        budgets, group_of = [], []
        for layer in range(layers):
            view = policies.LayerView(
                layer=layer, keys=nothing[:, :, None], lengths=torch.full((heads,), tokens),
                positions=nothing.long(), entropy=scores[layer],
            )  # fmt: skip
            dealt = policy.deal(view, nothing, nothing > 0, total, minimum, maximum, block_size)
            budgets.append((dealt * block_size).clamp(max=tokens).tolist())
            group_of.append(grouping.groups(scores[layer], min(groups, heads)).tolist())
    except ValueError as error:
        raise CalibrationError(str(error)) from error
    return HeadPlan(scores.tolist(), group_of, budgets)
