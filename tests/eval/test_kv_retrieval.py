"""Key-value retrieval: valid JSON that fills the length, the asked pair at its depth."""

import json
import re

import pytest

from uncomp.eval.tasks import kv_retrieval
from uncomp.eval.tasks.base import Built, Wanted
from uncomp.eval.tasks.fitting import size

(TASK,) = kv_retrieval.TASKS
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Pieces:
    """Tokenizer with a token for every three letters."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0] * len(re.findall(r"\w{1,3}|[^\w\s]", text))

    def decode(self, token_ids: list[int]) -> str:
        raise NotImplementedError


def build(length: int, count: int = 5, seed: int = 0) -> Built:
    return TASK.build(Wanted(length, count, seed, Pieces()))


@pytest.mark.parametrize("length", [1024, 8192])
def test_samples_fill_the_length_and_never_exceed_it(length: int) -> None:
    sizes = [size(sample, Pieces()) for sample in build(length).samples]
    assert len(sizes) == 5
    assert max(sizes) <= length
    assert min(sizes) >= 0.9 * length


def test_the_asked_pair_is_at_its_depth() -> None:
    for i, sample in enumerate(build(4096).samples):
        pairs = json.loads(sample.context)
        assert all(UUID.fullmatch(text) for pair in pairs.items() for text in pair)
        assert len({*pairs, *pairs.values()}) == 2 * len(pairs)
        (turn,) = sample.turns
        key = turn.question.removeprefix('\n\nKey: "').removesuffix('"')
        assert turn.references == (pairs[key],)
        assert [*pairs].index(key) == round(i / 4 * (len(pairs) - 1))
        assert sample.facts == {"length": 4096, "depth": i / 4, "pairs": len(pairs)}
        assert sample.metric == "contains"
        assert turn.max_tokens >= len(Pieces().encode(f'"{pairs[key]}"'))


def test_same_seed_same_samples() -> None:
    first = build(1024, seed=3)
    assert build(1024, seed=3) == first
    assert len({sample.id for sample in first.samples}) == 5
    keys = [key for sample in first.samples for key in json.loads(sample.context)]
    assert len(set(keys)) == len(keys)
    for sample in build(1024, seed=4).samples:
        assert not set(keys) & set(json.loads(sample.context))


def test_too_short_a_length_says_the_least() -> None:
    with pytest.raises(ValueError, match=r"kv_retrieval: a length of 99 .* needs about \d+ at l"):
        build(99)
