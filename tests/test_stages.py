"""Layer stages: the published boundaries and token counts."""

import pytest

from uncomp.stages import kept_tokens, largest_drops, sizes, stages

LLAMA_2_7B = [
    *(71.09, 70.85, 67.41, 69.05, 69.22, 69.52, 71.96, 73.15, 72.40, 73.33, 73.35),
    *(73.32, 73.69, 73.94, 74.62, 73.31, 73.60, 73.91, 73.91, 74.63, 74.46, 74.77),
    *(74.94, 75.72, 74.84, 77.00, 75.60, 76.24, 76.62, 75.76, 75.28, 73.45),
]


def test_oracle_stages():
    result = stages(LLAMA_2_7B, 1.0)
    assert result == [0] * 2 + [1] * 13 + [2] * 11 + [3] * 5 + [4]
    assert sizes(result) == [2, 13, 11, 5, 1]


@pytest.mark.parametrize(
    ("most", "count", "expected"),
    [
        (4096, 5, [4096, 3456, 2816, 2176, 1536]),
        (8192, 5, [8192, 6528, 4864, 3200, 1536]),
        (4096, 8, [4091, 3726, 3361, 2996, 2631, 2266, 1901, 1536]),
        (4096, 1, [4096]),
    ],
)
def test_oracle_kept_tokens(most, count, expected):
    assert [kept_tokens(stage, count, most, 1536) for stage in range(count)] == expected


def test_edges():
    assert stages([], 1.0) == []
    assert sizes([]) == []
    assert stages([3.0], 0.0) == [0]
    assert stages([3.0, 2.0, 2.0, 3.0], 1.0) == [0, 0, 0, 0]  # a drop of epsilon is no new stage
    assert stages([3.0, 2.0, 2.0, 1.0], 0.0) == [0, 1, 1, 2]


def test_errors_name_what_was_given():
    with pytest.raises(ValueError, match="got -1"):
        stages([1.0], -1)
    with pytest.raises(ValueError, match="stage=5"):
        kept_tokens(5, 5, 10, 1)
    with pytest.raises(ValueError, match="least=11"):
        kept_tokens(0, 5, 10, 11)


def test_largest_drops_reproduce_the_published_stages():
    assert largest_drops(LLAMA_2_7B, 5) == (2, 15, 26, 31)


def test_largest_drops_edges():
    assert largest_drops([], 5) == ()
    assert largest_drops([1.0, 2.0, 3.0], 5) == ()  # never falls
    assert largest_drops([3.0, 2.0, 1.0, 2.0, 0.0], 1) == ()
    assert largest_drops([3.0, 2.0, 1.0, 2.0, 0.0], 2) == (4,)
    assert largest_drops([3.0, 2.0, 1.0, 2.0, 0.0], 3) == (1, 4)  # equal drops: the earlier layer
    with pytest.raises(ValueError, match="at least 1, got 0"):
        largest_drops([1.0], 0)
