"""Rotary position embeddings (RoPE, arXiv 2104.09864), undone: keys as they were before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """How a layer's keys were rotated.

    Attributes:
        table: `[P, r]` float, cosines then sines of every position below P, r / 2 each; r is the
            even number of leading dimensions that are rotated.
        neox: dimension i goes with i + r / 2 (GPT-NeoX, Llama, Qwen); else 2 i with 2 i + 1
            (GPT-J).
    """

    table: Tensor
    neox: bool = True

    def undo(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys before RoPE, up to the factor that scaled tables (YaRN) multiply them with.

        Args:
            keys: `[H, N, d]` float, after RoPE; may be anything where the position is garbage.
            positions: `[H, N]` int64; clamped to the table.

        Returns:
            `[H, N, d]`, float32, or float64 for float64 keys.
        """
        dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
        width = self.table.shape[1]
        turned, rest = keys[..., :width].to(dtype), keys[..., width:].to(dtype)
        at = positions.clamp(0, self.table.shape[0] - 1)
        cos, sin = self.table[at].to(dtype).chunk(2, -1)  # [H, N, r / 2]
        if self.neox:
            first, second = turned.chunk(2, -1)
            back = torch.cat([first * cos + second * sin, second * cos - first * sin], -1)
        else:
            first, second = turned[..., ::2], turned[..., 1::2]
            pairs = [first * cos + second * sin, second * cos - first * sin]
            back = torch.stack(pairs, -1).flatten(-2)
        return torch.cat([back, rest], -1)
