"""Layer stages (UNComp, arXiv 2410.03090): consecutive layers between marked entropy drops."""

from collections.abc import Sequence
from itertools import pairwise


def stages(entropies: Sequence[float], epsilon: float) -> list[int]:
    """Stage of every layer: a new one starts where the entropy falls by more than `epsilon`.

    Args:
        entropies: one number per layer, from the first layer to the last.
        epsilon: smallest drop that does not start a stage, in the unit of `entropies`; >= 0.

    Raises:
        ValueError: `epsilon` negative or NaN.
    """
    if not epsilon >= 0:
        raise ValueError(f"the stage threshold epsilon must be >= 0, got {epsilon}")
    result = [0] if len(entropies) else []
    for previous, current in pairwise(entropies):
        result.append(result[-1] + int(current - previous < -epsilon))
    return result


def sizes(stage_of_layer: Sequence[int]) -> list[int]:
    """Number of layers in every stage, first stage first."""
    return [stage_of_layer.count(stage) for stage in range(max(stage_of_layer, default=-1) + 1)]


def kept_tokens(stage: int, count: int, most: int, least: int) -> int:
    """Tokens that enter the layers of a stage: falls from `most` in equal steps to about `least`.

    Args:
        stage: 0-based stage.
        count: number of stages.
        most: tokens in stage 0 (up to the rounding of the step).
        least: tokens in the last stage.

    Raises:
        ValueError: `stage` outside the `count` stages, or `least` above `most`.
    """
    if not 0 <= stage < count or least > most:
        raise ValueError(
            f"kept_tokens(stage={stage}, count={count}, most={most}, least={least}): need "
            "0 <= stage < count and least <= most"
        )
    if count == 1:
        return most
    return least + (most - least) // (count - 1) * (count - 1 - stage)


def largest_drops(entropies: Sequence[float], count: int) -> tuple[int, ...]:
    """First layers of the stages after the first: where the entropy falls most.

    Scale-free: needs no threshold per model, unlike `stages`.

    Args:
        entropies: one number per layer, from the first layer to the last.
        count: stages wanted, at least 1; there are fewer where the entropy falls less often.

    Returns:
        At most `count - 1` layers, ascending, all at least 1. Equal drops: the earlier layer.

    Raises:
        ValueError: `count` below 1.
    """
    if count < 1:
        raise ValueError(f"the number of stages must be at least 1, got {count}")
    drops = {layer: a - b for layer, (a, b) in enumerate(pairwise(entropies), 1) if a > b}
    deepest = sorted(drops, key=lambda layer: (-drops[layer], layer))
    return tuple(sorted(deepest[: count - 1]))
