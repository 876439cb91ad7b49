"""Keys unlike the average key (KeyDiff, arXiv 2504.15364); needs no queries."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from uncomp.policies.base import LayerView, Policy
from uncomp.policies.registry import register


@register
@dataclass(frozen=True)
class KeyDifference(Policy):
    """Keeps the entries whose keys point away from the head's mean key direction."""

    name: ClassVar[str] = "key_difference"

    def score(self, view: LayerView) -> Tensor:
        """Minus the cosine between the key and the mean of the unit-length keys."""
        valid = view.valid()
        return (difference(view.keys, valid) - 1).masked_fill(~valid, float("-inf"))


def difference(keys: Tensor, valid: Tensor) -> Tensor:
    """1 - cosine between a key and the mean of a head's unit-length keys.

    Args:
        keys: `[H, N, d]` float; garbage (NaN included) where not valid.
        valid: `[H, N]` bool.

    Returns:
        `[H, N]` float32 (float64 for float64 keys), meaningless where not valid.
    """
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    unit = F.normalize(keys.to(dtype).masked_fill(~valid[:, :, None], 0.0), dim=-1)
    mean = F.normalize(unit.sum(1), dim=-1)  # [H, d]; its length does not matter
    return 1 - torch.bmm(unit, mean[:, :, None])[:, :, 0]
