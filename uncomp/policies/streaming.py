"""The most recent tokens (StreamingLLM, arXiv 2309.17453; the sinks are forced elsewhere)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from uncomp.policies.base import LayerView, Policy
from uncomp.policies.registry import register


@register
@dataclass(frozen=True)
class Streaming(Policy):
    """Keeps the newest entries of every head."""

    name: ClassVar[str] = "streaming"

    def score(self, view: LayerView) -> Tensor:
        """The token position; see `Policy.score`."""
        # float32 would merge neighbours beyond 2^24; entries ascend in position, so the index does.
        index = torch.arange(view.positions.shape[1], device=view.positions.device)
        return index.to(torch.float32).expand(view.positions.shape).contiguous()
