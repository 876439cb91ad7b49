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
        dtype = torch.float64 if view.keys.dtype == torch.float64 else torch.float32
        valid = view.valid()
        keys = view.keys.to(dtype).masked_fill(~valid[:, :, None], 0.0)
        unit = F.normalize(keys, dim=-1)
        mean = F.normalize(unit.sum(1), dim=-1)  # [H, d]; its length does not matter
        similarity = torch.bmm(unit, mean[:, :, None])[:, :, 0]
        return torch.where(valid, -similarity, float("-inf"))
