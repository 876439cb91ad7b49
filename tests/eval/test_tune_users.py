"""Users of a pool and throughput: against hand numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from uncomp.config import UncompConfig
from uncomp.eval.engines.base import Answer, Ask, EngineError
from uncomp.eval.tune.speed import SHORT, SpeedError, compare
from uncomp.eval.tune.users import Pool, parse_bytes


def test_users_by_hand() -> None:
    """1000 tokens in blocks of 16: 62 full ones and 8 tokens. A quarter is 250 tokens, 242 beside
    the 8: 16 blocks, and the one with the 8."""
    pool = Pool(630, 16)
    config = UncompConfig(keep=0.25)
    assert pool.full_blocks(1000) == 63
    assert pool.kept_blocks(1000, config) == 17
    assert pool.users(1000) == 10
    assert pool.users(1000, config) == 1 + (630 - 63) // 17 == 34


def test_what_does_not_shrink_counts_as_full() -> None:
    pool = Pool(100, 16)
    assert pool.kept_blocks(160, UncompConfig(keep=0.25)) == 10  # shorter than min_tokens
    assert pool.kept_blocks(1600, UncompConfig(keep=1.0)) == 100
    assert pool.users(1600, UncompConfig(keep=1.0)) == pool.users(1600) == 1
    assert pool.users(1616, UncompConfig(keep=0.1)) == 0  # its prompt does not fit


def test_budget_is_the_same_for_every_length() -> None:
    pool, config = Pool(1000, 16), UncompConfig(budget=320)
    assert pool.kept_blocks(1600, config) == pool.kept_blocks(16000, config) == 20


def test_pool_of_memory() -> None:
    """8 layers x 2 x 4 heads x 64 x 2 bytes = 8192 bytes a token, 128 KiB a block."""
    assert Pool.of_memory(1 << 30, 8192, 16) == Pool(8192 - 1, 16)


@pytest.mark.parametrize(
    ("text", "value"), [("40GiB", 40 << 30), ("8e9", 8 * 10**9), ("1.5kb", 1500), ("7 MB", 7000000)]
)
def test_bytes(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GiB", "4XB", "-1GB", "nan", "0", "inf"])
def test_no_bytes(text: str) -> None:
    with pytest.raises(ValueError, match="must be bytes such as"):
        parse_bytes(text)


class Timed:
    """A prompt takes 3 s, a token of a batch 0.5 s with the full cache and 0.25 s without."""

    def __init__(self, stops_at: int = 10**6) -> None:
        self.now, self.stops_at = 0.0, stops_at
        self.arms: list[str] = []

    def answer(self, groups: Sequence[Sequence[Ask]]) -> Iterator[Answer]:
        first = groups[0][0]
        assert all(ask.ignore_eos for group in groups for ask in group)
        self.arms.append("own" if "kv_keep" in first.extra else "full")
        token = 0.25 if self.arms[-1] == "own" else 0.5
        self.now += 3 + token * first.max_tokens
        for group in groups:
            for ask in group:
                yield Answer(ask.key, "", min(ask.max_tokens, self.stops_at), "length", 0.0)


FULL, OWN = {"kv_compress": "false"}, {"kv_keep": 0.5}


def test_decoding_alone_is_timed() -> None:
    engine = Timed()
    found = compare(engine, [[1], [2]], FULL, OWN, 20, 2, lambda: engine.now)  # type: ignore[arg-type]
    assert (found.full.median, found.own.median) == pytest.approx((2 / 0.5, 2 / 0.25))
    assert found.full.repeats == found.own.repeats == 4
    # Two batches a measurement; the first two arms are not counted.
    assert engine.arms[::2] == ["full", "own", *["full", "own", "own", "full"] * 2]


def test_throughput_that_cannot_be_measured() -> None:
    engine = Timed()
    with pytest.raises(SpeedError, match="measure more tokens"):
        compare(engine, [[1]], FULL, OWN, 20, 1, lambda: 0.0)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="has not the 28 tokens"):
        compare(Timed(SHORT), [[1]], FULL, OWN, 20, 1, lambda: 0.0)  # type: ignore[arg-type]
