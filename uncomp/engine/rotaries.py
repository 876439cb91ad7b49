"""Finds how each attention layer of a vLLM model rotates its keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from uncomp.rotary import Rotary


def rotaries(model: Any, layers: Iterable[str]) -> list[Rotary | None]:
    """One for every layer; None where there is none, or none that is understood.

    Args:
        model: torch module.
        layers: names of its ``Attention`` modules; what rotates stands beside them, as
            ``rotary_emb`` with a ``cos_sin_cache`` of [positions, rotated dimensions].
    """
    modules = dict(model.named_modules())
    found: list[Rotary | None] = []
    for name in layers:
        beside = modules.get(name.rpartition(".")[0])
        rotary = getattr(beside, "rotary_emb", None)
        table: Any = getattr(rotary, "cos_sin_cache", None)
        if table is None or table.dim() != 2:
            found.append(None)
        else:
            found.append(Rotary(table, bool(getattr(rotary, "is_neox_style", True))))
    return found
