"""Keys of small norm (L2 norm strategy, arXiv 2406.11430); needs no queries."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from uncomp.policies.base import LayerView, Policy
from uncomp.policies.registry import register


@register
@dataclass(frozen=True)
class KeyNorm(Policy):
    """Keeps the entries with the smallest keys, which attract the most attention on average."""

    name: ClassVar[str] = "key_norm"

    def score(self, view: LayerView) -> Tensor:
        """Minus the L2 norm of the key; see `Policy.score`."""
        dtype = torch.float64 if view.keys.dtype == torch.float64 else torch.float32
        norm = torch.linalg.vector_norm(view.keys, dim=-1, dtype=dtype)
        return torch.where(view.valid(), -norm, float("-inf"))
