"""The prefill that a compaction is measured against: a stack of a model's size in plain torch.

Products and attention only. Norms, rotary embedding, cache writes and the last layer are left out:
a real prefill takes longer, so the share of it that a compaction takes is overstated here.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from uncomp.eval.bench.gpu_cases import Shape


@dataclass(frozen=True)
class Widths:
    """Numbers of channels. Attributes: hidden: of a token; inner: of the MLP."""

    hidden: int
    inner: int


LLAMA_WIDTHS = Widths(4096, 14336)
TOY_WIDTHS = Widths(64, 128)


class Stack:
    """Decoder layers with random weights.

    Attributes:
        times: how often the layers here stand for those of the model; note: says so.
    """

    def __init__(self, shape: Shape, widths: Widths, tokens: int, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self._cuda = device.type == "cuda"
        layers = shape.layers
        query, key = shape.heads * shape.group * shape.size, shape.heads * shape.size
        sizes = (
            (query + 2 * key, widths.hidden),
            (widths.hidden, query),
            (2 * widths.inner, widths.hidden),
            (widths.hidden, widths.inner),
        )
        if self._cuda:
            free = torch.cuda.mem_get_info(device)[0]
            weights = 2 * sum(a * b for a, b in sizes)
            passing = 2 * tokens * (4 * widths.hidden + 4 * widths.inner)
            while layers > 1 and layers * weights + passing > 0.8 * free:
                layers //= 2
        self.times = shape.layers // layers
        self.note = f" ({layers} run, times {self.times})" if self.times > 1 else ""
        random = torch.Generator(device).manual_seed(0)

        def weight(out: int, into: int) -> Tensor:
            made = torch.empty(out, into, dtype=torch.bfloat16, device=device)
            return made.normal_(0, into**-0.5, generator=random)

        self.weights = [[weight(*size) for size in sizes] for _ in range(layers)]
        self.hidden = torch.empty(tokens, widths.hidden, dtype=torch.bfloat16, device=device)
        self.hidden.normal_(generator=random)
        self.backend = self._fastest() if self._cuda else None
        if self.backend is not None:
            self.note += f", {self.backend.name} in torch"

    @torch.inference_mode()
    def run(self) -> Tensor:
        """All layers on the prompt."""
        hidden = self.hidden
        with self._only(self.backend):
            for qkv, out, up, down in self.weights:
                hidden = hidden + F.linear(self._attention(F.linear(hidden, qkv)), out)
                gate, value = F.linear(hidden, up).chunk(2, -1)
                hidden = hidden + F.linear(F.silu(gate).mul_(value), down)
        return hidden

    def _attention(self, qkv: Tensor) -> Tensor:
        shape, tokens = self.shape, qkv.shape[0]
        heads = qkv.view(1, tokens, -1, shape.size).transpose(1, 2)
        query = shape.heads * shape.group
        q, k, v = heads.split([query, shape.heads, shape.heads], 1)
        done = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return done.transpose(1, 2).reshape(tokens, -1)

    def _fastest(self) -> SDPBackend:
        """Of torch's attention kernels: the bar is a share of the fastest prefill."""
        taken: dict[SDPBackend, float] = {}
        qkv = F.linear(self.hidden, self.weights[0][0])
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            try:
                with self._only(backend), torch.inference_mode():
                    self._attention(qkv)
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    self._attention(qkv)
                    torch.cuda.synchronize()
                    taken[backend] = time.perf_counter() - start
            except RuntimeError:  # not for this device or these heads
                continue
        if not taken:
            raise RuntimeError("torch has neither its flash nor its cuDNN attention here")
        return min(taken, key=lambda backend: taken[backend])

    @staticmethod
    def _only(backend: SDPBackend | None) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if backend is None else sdpa_kernel(backend)
