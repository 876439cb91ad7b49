"""Importance of heads: what a model looks up when it reads a text a second time (`importance`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from uncomp.calibration.file import DECIMALS, CalibrationError
from uncomp.calibration.recording import read
from uncomp.importance import KEEPS, looked_up, shares_of

#: between the two readings (KVzip, arXiv 2505.23416)
REQUEST = "\n\nRepeat the previous context exactly.\n\n"
#: tokens of a text at most: the second reading attends to both, and shares hardly depend on it
TOKENS = 1024
#: texts that are read twice: shares of heads correlate with 0.9 to 0.99 from one kind of text to
#: another (docs/calibration.md)
SAMPLES = 6


@dataclass
class _LookedUp:
    """Scores of one text: layer -> [KV heads, first]."""

    first: int
    layers: dict[int, torch.Tensor] = field(default_factory=dict)

    def record(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float, softcap: float
    ) -> None:
        queries = query[0].unflatten(0, (key.shape[1], -1)).float()
        scores = looked_up(queries, key[0].float(), self.first, scale, softcap)
        self.layers[layer] = scores.cpu()


def measure_importance(
    model: Any,
    tokenizer: Any,
    texts: Sequence[list[int]],
    longest: int | None,
    progress: Callable[[Iterable[list[int]]], Iterable[list[int]]] = iter,
) -> dict[str, Any]:
    """The calibration file's ``importance``.

    Args:
        model, tokenizer: of transformers.
        texts: token ids; of at most `SAMPLES` of them the first `TOKENS` are read.
        longest: positions that the model has; None: enough.
        progress: wraps the iteration over texts.

    Raises:
        CalibrationError: too few positions to read anything twice.
    """
    request = list(tokenizer(REQUEST, add_special_tokens=False)["input_ids"])
    room = TOKENS if longest is None else (longest - len(request)) // 2
    tokens = min(TOKENS, room, len(texts[0]))
    if tokens < 1:
        raise CalibrationError(
            f"the model has {longest} positions, too few to read a text twice with "
            f"{len(request)} tokens between; such a model cannot be calibrated"
        )
    chosen = [ids[:tokens] for ids in texts[:SAMPLES]]
    found = []
    for ids in progress(chosen):
        recorder = _LookedUp(tokens)
        read(model, [*ids, *request, *ids], recorder)
        scores = torch.stack([recorder.layers[layer] for layer in sorted(recorder.layers)])
        found.append(shares_of(scores))
    shares = torch.stack(found).mean(0).clamp(0, 1)
    return {
        "keeps": list(KEEPS),
        "shares": [
            [[round(value, DECIMALS) for value in row] for row in table]
            for table in shares.tolist()
        ],
        "samples": len(chosen),
        "tokens": tokens,
    }
