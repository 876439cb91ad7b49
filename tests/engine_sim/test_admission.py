"""Requests that ask for what this engine cannot know."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from uncomp.engine.admission import Rejected, check_request


def check(kind: str, skip_tokenizer_init: bool, **extra: Any) -> None:
    config = SimpleNamespace(
        additional_config={"uncomp": {"keep": 0.5, "pooling_kind": kind}},
        model_config=SimpleNamespace(skip_tokenizer_init=skip_tokenizer_init),
    )
    params = SimpleNamespace(extra_args=extra)
    check_request(config, SimpleNamespace(sampling_params=params, prompt_token_ids=[1] * 9))


def test_words_need_a_tokenizer() -> None:
    check("ema", True)
    check("word", False)
    check("word", True, kv_policy="streaming")  # pools nothing
    check("ema", False, kv_settings={"pooling_kind": "word"})
    with pytest.raises(Rejected, match=r"runs without a tokenizer.*set pooling_kind to 'ema'"):
        check("ema", True, kv_settings={"pooling_kind": "word"})
