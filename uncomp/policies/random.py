"""Random tokens: the control every other policy has to beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from uncomp.policies.base import LayerView, Policy
from uncomp.policies.registry import register

_WORD = 0xFFFFFFFF


@register
@dataclass(frozen=True)
class Random(Policy):
    """Keeps entries by a hash of (seed, layer, head, position): the same in every run and batch.

    Attributes:
        seed: any integer.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def score(self, view: LayerView) -> Tensor:
        """Uniform in [0, 1); see `Policy.score`."""
        heads = torch.arange(len(view.lengths), device=view.positions.device)
        state = _mix(heads + _mix_int(view.layer + _mix_int(self.seed)))  # [H]
        words = _mix(view.positions + state[:, None])
        return (words >> 8).to(torch.float32) / 2**24  # 24 bits are exact in float32


def _mix(word: Tensor) -> Tensor:
    """32-bit integer hash; the multiplier is below 2^31, so int64 products do not overflow."""
    word = word & _WORD
    for _ in range(2):
        word = ((word ^ (word >> 16)) * 0x45D9F3B) & _WORD
    return word ^ (word >> 16)


def _mix_int(word: int) -> int:
    return int(_mix(torch.tensor(word & _WORD)))
