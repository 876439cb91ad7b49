"""What the tokens of the served model say, for scores that are handed on from word to word."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt
from vllm.tokenizers import cached_tokenizer_from_config

from uncomp.spans import Vocabulary

#: token ids -> what every token begins
Gaps = Callable[[Sequence[int]], npt.NDArray[Any]]


def token_gaps(model_config: Any, now: bool) -> Gaps | None:
    """`Vocabulary.gaps` of the model; ``None``: the engine runs without a tokenizer.

    Args:
        model_config: vLLM's.
        now: read the vocabulary at once (a second or two), not when it is first needed.
    """
    if model_config.skip_tokenizer_init:
        return None

    @functools.cache
    def vocabulary() -> Vocabulary:
        return Vocabulary.of(cached_tokenizer_from_config(model_config))

    if now:
        vocabulary()
    return lambda ids: vocabulary().gaps(ids)
