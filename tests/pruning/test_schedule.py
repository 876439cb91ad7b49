"""How many tokens enter which layers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uncomp.pruning import Schedule, parse_layers

LLAMA = Schedule((2, 15, 26, 31), 32)


def test_the_published_counts():
    assert LLAMA.kept(4096, 0.375, 1, 12) == (3456, 2816, 2176, 1536)


def test_the_published_mean_fraction():
    """Of Llama-2-7B at 4,096 tokens: 0.736 of the tokens times layers."""
    read = LLAMA.token_layers(4096, LLAMA.kept(4096, 0.375, 1, 12))
    assert read / (32 * 4096) == pytest.approx(0.736, abs=5e-4)


@given(
    tokens=st.integers(1, 20_000),
    keep=st.floats(0.01, 1.0),
    block=st.sampled_from([1, 16, 32, 128]),
    forced=st.integers(1, 400),
    floor=st.integers(0, 3000),
)
def test_counts_fall_by_whole_blocks(tokens, keep, block, forced, floor):
    counts = Schedule((2, 15, 26, 31), 32, floor).kept(tokens, keep, block, forced)
    assert len(counts) == 4
    assert list(counts) == sorted(counts, reverse=True)
    for stage, count in enumerate(counts, 1):
        assert (tokens - count) % block == 0
        assert min(tokens, max(forced, floor)) <= count <= tokens
        wanted = max(forced, floor, round(tokens * LLAMA.fraction(stage, keep)))
        assert count < min(tokens, wanted) + block


def test_everything_is_kept_at_one():
    assert LLAMA.kept(5000, 1.0, 32, 40) == (5000,) * 4
    assert LLAMA.token_layers(5000, (5000,) * 4) == 5000 * 32


def test_short_prompts_are_left_alone():
    assert Schedule((2,), 4, floor=1536).kept(1536, 0.1, 32, 40) == (1536,)


def test_no_stages_keep_everything():
    schedule = Schedule((), 4)
    assert schedule.kept(100, 0.1, 32, 40) == ()
    assert schedule.token_layers(100, ()) == 400


@pytest.mark.parametrize("starts", [(0,), (4,), (2, 2), (3, 2)])
def test_stages_that_a_model_does_not_have(starts):
    with pytest.raises(ValueError, match=r"different layers of 1\.\.3"):
        Schedule(starts, 4)


def test_a_fraction_that_is_none():
    with pytest.raises(ValueError, match=r"keep=0: must be in \(0, 1\]"):
        LLAMA.kept(100, 0, 32, 40)


def test_layers_as_text():
    assert parse_layers("2, 15,26") == (2, 15, 26)
    with pytest.raises(ValueError, match="'2;3': must be the first layers"):
        parse_layers("2;3")
