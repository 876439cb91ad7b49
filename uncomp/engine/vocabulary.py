"""What the tokens of the served model say, for scores that stay inside sentences."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt
from vllm.tokenizers import cached_tokenizer_from_config

from uncomp.sentences import Sentences

#: token ids -> positions at which sentences begin
Starts = Callable[[Sequence[int]], npt.NDArray[Any]]


def sentence_starts(model_config: Any, now: bool) -> Starts | None:
    """Finds where sentences begin; ``None``: the engine runs without a tokenizer.

    Args:
        model_config: vLLM's.
        now: read the vocabulary at once (a second or two), not when it is first needed.
    """
    if model_config.skip_tokenizer_init:
        return None

    @functools.cache
    def vocabulary() -> Sentences:
        return Sentences.of(cached_tokenizer_from_config(model_config))

    if now:
        vocabulary()
    return lambda ids: vocabulary().starts(ids)
