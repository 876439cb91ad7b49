"""Fixtures for the tests of the evaluation."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from uncomp.eval.run.prompts import Renderer
from uncomp.eval.tasks.base import Sample

# The import mode of the suite keeps test folders off sys.path.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def real_tokenizer(demo_model: Path) -> Any:
    """The demo model's tokenizer: bytes in pairs, single digits, a chat template."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="session")
def longest(real_tokenizer: Any) -> Callable[[Sample], int]:
    """Tokens of prompt and answer of a sample's longest turn, as the runner sends it."""
    renderer = Renderer(real_tokenizer, 1 << 20, True)

    def tokens(sample: Sample) -> int:
        sizes = []
        for i, turn in enumerate(sample.turns):
            prompt = renderer.prompt(sample, i)
            sizes.append(len(prompt.ids) + (len(prompt.forced) or turn.max_tokens))
        return max(sizes)

    return tokens
