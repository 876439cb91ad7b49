"""Head entropies to head groups (UNComp, arXiv 2410.03090: equal groups by rank inside a layer)."""

from torch import Tensor


def groups(entropies: Tensor, count: int) -> Tensor:
    """Group of every head: floor(rank * count / H), rank by ascending entropy.

    Args:
        entropies: `[..., H]` float, heads of a layer in the last dimension; no NaN (looked for in
            host memory only: on a GPU that would wait for the device).
        count: number of groups M, at least 1. With more groups than heads some stay empty.

    Returns:
        `[..., H]` int64; 0 holds the lowest entropies. Equal entropies: the lower head ranks lower.

    Raises:
        ValueError: `entropies` without dimension or with NaN, or `count` below 1.
    """
    if count < 1:
        raise ValueError(f"the number of head groups must be at least 1, got {count}")
    if entropies.dim() < 1:
        raise ValueError(f"groups needs entropies [..., H], got shape {list(entropies.shape)}")
    if entropies.device.type == "cpu" and bool(entropies.isnan().any()):
        raise ValueError("groups: an entropy is NaN; recompute or recalibrate the entropies")
    rank = entropies.argsort(dim=-1, stable=True).argsort(dim=-1)
    return rank * count // max(entropies.shape[-1], 1)
