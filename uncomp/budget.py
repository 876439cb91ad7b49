"""Groups to budgets: the published tables, the mean-preserving rule, and dealing integers exactly.

A budget is the number of tokens (or sub-blocks) one KV head keeps. Lists run from the lowest group
to the highest.
"""

import math

import torch
from torch import Tensor

V1_BUDGETS = (256, 512)
"""Two groups of UNComp v1 (arXiv 2410.03090), mean 384 tokens."""

V2_BUDGETS = (122, 196, 270, 344, 418, 492, 566, 640)
"""Eight groups of UNComp v2 (the EMNLP 2025 version), mean 381 tokens."""


def halved(top: int) -> list[int]:
    """The v1 rule for two groups: `top` tokens for the high group, half of it for the low one."""
    return [top // 2, top]


def linear_step(top: int, step: int, groups: int) -> list[int]:
    """The v2 rule: `top` tokens for the highest group, `step` fewer for each one below.

    Raises:
        ValueError: `groups` below 1, or a step that leaves the lowest group below 0.
    """
    if groups < 1 or top - step * (groups - 1) < 0:
        raise ValueError(
            f"linear_step(top={top}, step={step}, groups={groups}): need at least one group and "
            f"top - step * (groups - 1) >= 0"
        )
    return [top - step * (groups - 1 - group) for group in range(groups)]


def group_shares(groups: int, ratio: float) -> list[float]:
    """Relative budgets of equal groups: linear from bottom to top, top / bottom = `ratio`, mean 1.

    Raises:
        ValueError: `groups` below 1, or `ratio` not a finite number of at least 1.
    """
    if groups < 1:
        raise ValueError(f"the number of head groups must be at least 1, got {groups}")
    if not (math.isfinite(ratio) and ratio >= 1):
        raise ValueError(f"the budget ratio top / bottom must be finite and >= 1, got {ratio}")
    if groups == 1:
        return [1.0]
    bottom = 2 / (1 + ratio)
    top = ratio * bottom
    return [bottom + (top - bottom) * group / (groups - 1) for group in range(groups)]


def mean_linear(mean: int, groups: int, ratio: float) -> list[int]:
    """Integer budgets of equal groups with exactly this mean; `group_shares` rounded down.

    What rounding takes away goes to the highest groups, one each.

    Raises:
        ValueError: `mean` below 0, and everything `group_shares` rejects.
    """
    if mean < 0:
        raise ValueError(f"the mean budget must not be negative, got {mean}")
    result = [math.floor(mean * share + 1e-9) for share in group_shares(groups, ratio)]
    for step in range(mean * groups - sum(result)):
        result[groups - 1 - step % groups] += 1
    return result


def deal(weights: Tensor, total: int | Tensor, minimum: Tensor, maximum: Tensor) -> Tensor:
    """Deal `total` units to heads in proportion to their weights, within bounds, losing none.

    The real-valued shares are the clamped proportional ones (what a bound takes or gives moves to
    the unbounded heads, again in proportion); they are rounded by largest remainder. Tensor
    operations only: on a GPU nothing waits for the device.

    Args:
        weights: `[..., H]` float, non-negative and finite. Only ratios matter; all zero means
            equal. Leading dimensions (layers, requests) are dealt independently.
        total: units to deal; int, or `[...]` integers.
        minimum: `[..., H]` int64, at least 0.
        maximum: `[..., H]` int64, at least `minimum`.

    Returns:
        `[..., H]` int64 on the device of `weights`, inside the bounds, with sum
        min(total, sum(maximum)). Ties go to the lower head.

    Raises:
        ValueError: shapes that do not fit; for tensors in host memory also bad weights or bounds,
            or sum(minimum) > total.
    """
    shapes = {tuple(t.shape) for t in (weights, minimum, maximum)}
    if len(shapes) != 1 or weights.dim() < 1:
        raise ValueError(f"deal needs weights, minimum and maximum [..., H], got {sorted(shapes)}")
    units = torch.as_tensor(total, device=weights.device).to(torch.int64)
    units = units.expand(weights.shape[:-1])
    if weights.device.type == "cpu":
        _check_values(weights, units, minimum, maximum)
    if weights.shape[-1] == 0:
        return minimum.clone()
    units = torch.minimum(units, maximum.sum(-1))
    shares = _clamped_shares(weights.to(torch.float64), units, minimum, maximum)
    # Rounded, so that shares equal up to floating-point noise are ties.
    shares = shares.round(decimals=9)
    parts = shares.floor().to(torch.int64)
    remainders = (shares - parts).round(decimals=9).masked_fill(parts >= maximum, -1.0)
    rank = remainders.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    left = units - parts.sum(-1)
    return parts + (rank < left.unsqueeze(-1)).to(torch.int64)


def _clamped_shares(weights: Tensor, total: Tensor, minimum: Tensor, maximum: Tensor) -> Tensor:
    """Proportional shares clamped to the bounds with sum `total`, which the bounds allow.

    share(u) = clamp(weight * u, low, high) rises with u, its sum piecewise linearly with a corner
    wherever a head reaches a bound. The answer lies on the piece after the last corner whose sum is
    at most `total`.
    """
    largest = weights.amax(-1, keepdim=True)
    # Heads of weight 0 get what the others cannot take: a weight that matters only then.
    weights = torch.where(largest > 0, weights / largest, 1.0).clamp_min(1e-15)
    low, high = minimum.to(torch.float64), maximum.to(torch.float64)
    corners = torch.cat([low / weights, high / weights], -1).sort(-1).values  # [..., 2H]
    at = corners.unsqueeze(-1) * weights.unsqueeze(-2)  # [..., 2H, H]
    sums = at.clamp(low.unsqueeze(-2), high.unsqueeze(-2)).sum(-1)
    reached = sums <= total.unsqueeze(-1) + 1e-9
    last = (reached.sum(-1, keepdim=True) - 1).clamp_min(0)
    unit, dealt = corners.gather(-1, last), sums.gather(-1, last)
    rising = (low <= unit * weights * (1 + 1e-12)) & (unit * weights * (1 + 1e-12) < high)
    slope = torch.where(rising, weights, 0.0).sum(-1, keepdim=True)
    step = torch.where(slope > 0, (total.unsqueeze(-1) - dealt) / slope, 0.0).clamp_min(0.0)
    return ((unit + step) * weights).clamp(low, high)


def _check_values(weights: Tensor, total: Tensor, minimum: Tensor, maximum: Tensor) -> None:
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError(f"deal: weights must be finite and >= 0, got {weights.tolist()}")
    if not bool(((minimum >= 0) & (minimum <= maximum)).all()):
        raise ValueError(
            "deal: every head needs 0 <= minimum <= maximum, got "
            f"{minimum.tolist()} and {maximum.tolist()}"
        )
    if bool((minimum.sum(-1) > total).any()):
        raise ValueError(
            f"deal: the minima {minimum.tolist()} need {minimum.sum(-1).tolist()} but only "
            f"{total.tolist()} are to be dealt; raise the total or lower the minima"
        )
