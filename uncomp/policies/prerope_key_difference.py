"""Keys unlike the average key, as they were before RoPE; needs no queries."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from uncomp.policies.base import LayerView, Policy
from uncomp.policies.key_difference import difference
from uncomp.policies.registry import register


@register
@dataclass(frozen=True)
class PreropeKeyDifference(Policy):
    """`KeyDifference` (KeyDiff, arXiv 2504.15364) with the rotation of positions taken back.

    After RoPE, equal content at different places points into different directions, and the mean key
    is a blur. Before it, what repeats points where the mean does, and what is said once stands out,
    whatever will be asked about it: the policy for prompts that are compressed before the question
    is known.
    """

    name: ClassVar[str] = "prerope_key_difference"
    pool_scores: ClassVar[bool] = True
    like_everywhere: ClassVar[bool] = True
    needs_rotary: ClassVar[bool] = True

    def score(self, view: LayerView) -> Tensor:
        """1 - cosine with the mean direction, in [0, 2]; 0 for padding. See `Policy.score`."""
        keys = view.keys
        if view.rotary is not None:
            keys = view.rotary.undo(keys, view.positions)
        valid = view.valid()
        return difference(keys, valid).masked_fill(~valid, 0.0)
