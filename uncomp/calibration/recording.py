"""A pass of a Hugging Face model whose queries and keys are seen, layer after layer, after RoPE."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

ATTENTION_NAME = "uncomp_calibration"


class Recorder(Protocol):
    """Sees the queries and keys of every layer, once a pass."""

    def record(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float, softcap: float
    ) -> None:
        """query [1, query heads, tokens, d], key [1, KV heads, tokens, d], both after RoPE."""


def _attention_base(model: Any) -> str:
    """The attention to delegate to: sdpa, or eager where sdpa would compute something else."""
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if softcap or not getattr(model, "_supports_sdpa", True) else "sdpa"


@contextmanager
def recording(model: Any, recorder: Recorder) -> Iterator[None]:
    """Put a recording attention into transformers' registries and into `model`; undo at exit."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    base = _attention_base(model)
    softcap = float(getattr(model.config.get_text_config(), "attn_logit_softcapping", None) or 0)

    def attend(module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any):
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        recorder.record(module.layer_idx, query, key, scale, softcap)
        if base == "sdpa":
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, *args, **kwargs)
        # Each model file has its own eager function, with its soft cap or its sinks.
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, *args, **kwargs)

    before = model.config._attn_implementation
    # Assignment to the shared registry instances, unlike register(), can be undone.
    ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME] = attend
    ALL_MASK_ATTENTION_FUNCTIONS[ATTENTION_NAME] = ALL_MASK_ATTENTION_FUNCTIONS[base]
    try:
        model.set_attn_implementation(ATTENTION_NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME]
        del ALL_MASK_ATTENTION_FUNCTIONS[ATTENTION_NAME]


@torch.inference_mode()
def read(model: Any, ids: Sequence[int], recorder: Recorder) -> None:
    """One pass over a token sequence, without KV cache and output layer.

    Args:
        model: a transformers causal LM whose attention goes through AttentionInterface.
    """
    with recording(model, recorder):
        tokens = torch.tensor([list(ids)], device=model.device)
        model.base_model(input_ids=tokens, use_cache=False)
