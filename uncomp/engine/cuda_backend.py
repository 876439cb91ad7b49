"""vLLM's FlashAttention backend with decode rows over sub-blocks."""

from __future__ import annotations

from typing import Any, ClassVar

from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from uncomp.engine.sub_block_backend import SubBlockBuilder, SubBlockImpl


class SubBlockFlashBackend(FlashAttentionBackend):
    """FLASH_ATTN with compressed rows."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        return SubBlockFlashImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return SubBlockFlashBuilder


class SubBlockFlashBuilder(SubBlockBuilder, FlashAttentionMetadataBuilder):
    """Full graphs for batches of one token a row, which are replayed with our kernel."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.full_graphs = self.compilation_config.cudagraph_mode.has_full_cudagraphs()


class SubBlockFlashImpl(SubBlockImpl, FlashAttentionImpl):
    """Prefill chunks by FlashAttention, single tokens over sub-blocks."""
