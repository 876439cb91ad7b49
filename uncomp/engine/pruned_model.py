"""The parts of a vLLM model that prompt pruning hooks into."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

#: what a decoder layer is given, and what of it has a row per token
GIVEN = ("positions", "hidden_states", "residual")


@dataclass(frozen=True)
class PrunedModel:
    """Its decoder layers, and what vLLM compiles.

    Attributes:
        model: its output has a row per token.
        layers: decoder layers, in order.
        compiled: modules that vLLM calls through a compiled graph.
    """

    model: nn.Module
    layers: list[nn.Module]
    compiled: list[Any]

    @classmethod
    def of(cls, model: nn.Module, attention: Sequence[str]) -> PrunedModel:
        """Find them.

        Args:
            attention: names of the attention modules, in order, one per decoder layer.

        Raises:
            RuntimeError: the decoder layers do not take positions, hidden states and residual.
        """
        modules = dict(model.named_modules())
        layers = [_decoder_layer(modules, name) for name in attention]
        for layer in layers:
            names = list(inspect.signature(layer.forward).parameters)
            if not set(GIVEN) <= set(names):
                raise RuntimeError(
                    f"uncomp: prompts of {type(model).__name__} cannot be pruned: its layers "
                    f"({type(layer).__name__}) take {names}, not {list(GIVEN)}; drop prefill_keep"
                )
        compiled = [m for m in modules.values() if hasattr(m, "do_not_compile")]
        return cls(model, layers, compiled)


def _decoder_layer(modules: dict[str, nn.Module], attention: str) -> nn.Module:
    """The element of the model's list of layers that holds an attention module."""
    parts = attention.split(".")
    at = max((i for i, part in enumerate(parts) if part.isdigit()), default=None)
    found = None if at is None else modules.get(".".join(parts[: at + 1]))
    if found is None:
        raise RuntimeError(f"uncomp: no decoder layer was found around {attention}")
    return found
