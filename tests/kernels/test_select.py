"""Pooling and choice: worked numbers, tie rules, a sorted() reference, forced entries, padding."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from uncomp.kernels.select import BREAK, ema_pool, max_pool, pool_scores, top_entries

quick = settings(deadline=None, max_examples=150)
LOWEST = float("-inf")


def none(scores: Tensor) -> Tensor:
    return torch.zeros(scores.shape, dtype=torch.bool)


def everything(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape, dtype=torch.bool)


def choose(pooled, raw, keep, eligible=None, forced=None) -> list[int]:
    """`top_entries` for one head given as lists."""
    pooled = torch.as_tensor(pooled, dtype=torch.float64)[None]
    raw = torch.as_tensor(raw, dtype=torch.float64)[None]
    eligible = everything(raw) if eligible is None else torch.tensor([eligible])
    forced = none(raw) if forced is None else torch.tensor([forced])
    return top_entries(pooled, raw, eligible, forced, torch.tensor([keep]))[0].tolist()


@pytest.fixture
def window_attention() -> Tensor:
    """`[2, 16]`: attention of the two window queries of the worked example."""
    logits = torch.tensor([[((5 * i + 3 * j * j) % 11) / 2 for j in range(16)] for i in range(2)])
    logits[0, 15] = LOWEST
    return logits.double().softmax(-1)


def rounded(scores: Tensor) -> Tensor:
    """Ties of the worked example are exact only up to rounding."""
    return scores.round(decimals=12)


class TestOracle:
    """N=16, window 2, pooling width 3, 7 entries kept."""

    def test_pooled_scores(self, window_attention):
        pooled = max_pool(window_attention.sum(0)[None], 3, torch.tensor([14]))[0]
        expected = [0.073934] * 2 + [0.200974] * 2 + [0.362172] * 4
        expected += [0.200974] * 2 + [0.073934] * 4
        assert pooled[:14].tolist() == pytest.approx(expected, abs=6e-7)
        assert pooled[14:].tolist() == [LOWEST, LOWEST]

    def test_kept_entries(self, window_attention):
        raw = rounded(window_attention.sum(0)[None])
        limit = torch.tensor([14])
        pooled = max_pool(raw, 3, limit)
        forced = none(raw)
        forced[:, 14:] = True
        kept = top_entries(pooled, raw, ~forced, forced, torch.tensor([7]))
        assert kept.tolist() == [[3, 4, 5, 6, 7, 14, 15]]

    def test_ties_by_index_only(self, window_attention):
        raw = rounded(window_attention.sum(0))[:14]
        pooled = max_pool(raw[None], 3)[0]
        assert choose(pooled, torch.zeros(14), 5) == [2, 4, 5, 6, 7]

    def test_no_pooling(self, window_attention):
        raw = rounded(window_attention.sum(0))[:14]
        assert choose(raw, raw, 5) == [3, 4, 5, 6, 8]

    def test_decode_step(self, window_attention):
        positions = [3, 4, 5, 6, 7, 14, 15, 16]
        new = torch.tensor([0.10, 0.30, 0.02, 0.08, 0.15, 0.05, 0.10, 0.20]).double()
        old = torch.cat([window_attention[1, positions[:7]], torch.zeros(1)])
        raw = (old + new)[None]
        expected = [0.252583, 0.392546, 0.024608, 0.084608, 0.242546, 0.202583]
        assert raw[0, :6].tolist() == pytest.approx(expected, abs=6e-7)
        forced = none(raw)
        forced[:, 6:] = True
        pooled = max_pool(raw, 3, torch.tensor([6]))
        slots = top_entries(pooled, raw, ~forced, forced, torch.tensor([7]))[0].tolist()
        assert slots == [0, 1, 2, 4, 5, 6, 7]
        assert [positions[slot] for slot in slots] == [3, 4, 5, 7, 14, 15, 16]

    def test_hidden_state_choice(self):
        rows = torch.tensor(
            [[[(3 * a + 7 * r + b * b) % 13 for b in range(10)] for r in range(2)] for a in (0, 1)]
        ).double()
        score = (rows / rows.sum(-1, keepdim=True)).sum((0, 1))
        score = rounded(score)
        assert choose(score, score, 6) == [0, 1, 2, 3, 5, 8]
        forced = [b >= 8 for b in range(10)]
        assert choose(score, score, 6, forced=forced) == [1, 2, 3, 5, 8, 9]


def reference_choice(pooled, raw, eligible, forced, keep) -> list[int]:
    order = sorted(
        (j for j in range(len(raw)) if eligible[j] and not forced[j]),
        key=lambda j: (-pooled[j], -raw[j], j),
    )
    fixed = [j for j in range(len(raw)) if forced[j]]
    return sorted(fixed + order[: keep - len(fixed)])


# Few distinct values, so that ties of both kinds are common.
entry = st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans(), st.booleans())
heads = st.integers(1, 12).flatmap(
    lambda n: st.lists(
        st.tuples(st.lists(entry, min_size=n, max_size=n), st.integers(0, 14)),
        min_size=1,
        max_size=4,
    )
)


@quick
@given(heads, st.sampled_from([torch.float32, torch.float64]))
def test_matches_sorting_with_ties_forced_entries_and_unequal_budgets(rows, dtype):
    pooled, raw, eligible, forced = (
        torch.tensor([[column[field] for column in row] for row, _ in rows]) for field in range(4)
    )
    keep = torch.tensor([slots + sum(e[3] for e in row) for row, slots in rows])
    scores = pooled.to(dtype), raw.to(dtype)
    result = top_entries(*scores, eligible, forced, keep)
    assert result.shape == (len(rows), min(int(keep.max()), raw.shape[1]))
    for head in range(len(rows)):
        expected = reference_choice(
            *(t[head].tolist() for t in (pooled, raw, eligible, forced)), int(keep[head])
        )
        kept = result[head].tolist()
        assert kept == expected + [-1] * (len(kept) - len(expected))
        assert len(expected) == min(int(keep[head]), int((eligible | forced)[head].sum()))
        # A second run on scores that are garbage wherever nothing may be read.
    poison = torch.where(eligible & ~forced, 0.0, float("nan")).to(dtype)
    assert top_entries(*(s + poison for s in scores), eligible, forced, keep).equal(result)


@quick
@given(st.integers(0, 9999), st.integers(1, 200), st.integers(0, 20), st.integers(0, 8))
def test_window_and_sinks_are_always_kept(seed, entries, sinks, window):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(3, entries, generator=generator)
    lengths = torch.randint(0, entries + 1, (3,), generator=generator)
    index = torch.arange(entries)
    valid = index < lengths[:, None]
    forced = valid & ((index < sinks) | (index >= (lengths - window)[:, None]))
    keep = forced.sum(1) + torch.randint(0, entries, (3,), generator=generator)
    kept = top_entries(raw, raw, valid & ~forced, forced, keep)
    for head in range(3):
        chosen = {j for j in kept[head].tolist() if j >= 0}
        assert set(forced[head].nonzero()[:, 0].tolist()) <= chosen
        assert chosen <= set(range(int(lengths[head])))
        assert len(chosen) == min(int(keep[head]), int(lengths[head]))
        if keep[head] >= lengths[head]:
            assert chosen == set(range(int(lengths[head])))


def test_long_rows_match_sorting():
    raw = torch.randint(0, 500, (8, 6000)).float()
    pooled = max_pool(raw, 15)
    keep = torch.randint(1, 6000, (8,))
    result = top_entries(pooled, raw, everything(raw), none(raw), keep)
    for head in range(8):
        lists = (t[head].tolist() for t in (pooled, raw, everything(raw), none(raw)))
        expected = reference_choice(*lists, int(keep[head]))
        assert [j for j in result[head].tolist() if j >= 0] == expected


def test_nan_and_infinite_scores_keep_the_count_exact():
    raw = torch.tensor([[float("nan"), 1.0, LOWEST, float("inf"), float("nan"), 0.0]])
    order = [3, 1, 5, 0, 2, 4]  # NaN counts as -inf, so those three tie and go by index
    for keep in range(7):
        kept = top_entries(raw, raw, everything(raw), none(raw), torch.tensor([keep]))
        assert kept[0].tolist() == sorted(order[:keep])


def test_nothing_to_keep_or_to_choose_from():
    empty = torch.empty(2, 0)
    assert top_entries(empty, empty, none(empty), none(empty), torch.tensor([3, 0])).shape == (2, 0)
    scores = torch.rand(2, 5)
    assert top_entries(scores, scores, none(scores), none(scores), torch.tensor([0, 0])).shape == (
        2,
        0,
    )
    kept = top_entries(scores, scores, none(scores), none(scores), torch.tensor([2, 1]))
    assert kept.tolist() == [[-1, -1], [-1, -1]]


def test_more_forced_than_kept():
    scores = torch.rand(2, 4)
    forced = torch.tensor([[True, True, True, False], [False] * 4])
    with pytest.raises(ValueError, match=r"\[3, 0\] entries per head are forced but only \[2, 2\]"):
        top_entries(scores, scores, everything(scores), forced, torch.tensor([2, 2]))


def test_wrong_shapes():
    scores = torch.rand(2, 4)
    with pytest.raises(ValueError, match=r"keep \[H\], got .*\[3\]"):
        top_entries(scores, scores, everything(scores), none(scores), torch.tensor([1, 1, 1]))


def reference_pool(raw: list[float], width: int, limit: int) -> list[float]:
    half = width // 2
    return [
        max(raw[max(0, j - half) : min(limit, j + half + 1)]) if j < limit else LOWEST
        for j in range(len(raw))
    ]


@quick
@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40),
    st.sampled_from([1, 3, 7, 15, 31]),
    st.data(),
)
def test_pooling_matches_the_definition_and_ignores_what_lies_beyond_the_limit(raw, width, data):
    limit = data.draw(st.integers(0, len(raw)))
    expected = reference_pool(raw, width, limit)
    scores = torch.tensor([raw, raw])
    scores[1, limit:] = float("nan")
    pooled = max_pool(scores, width, torch.tensor([limit, limit]))
    assert pooled.tolist() == [expected, expected]


@pytest.mark.parametrize(
    ("length", "after", "before"), [(1, 4, 4), (2, 8, 4), (5, 32, 16), (16, 64, 32), (40, 256, 128)]
)
@pytest.mark.parametrize("entries", [1, 7, 150])
def test_moving_average_is_its_definition(
    length: int, after: int, before: int, entries: int
) -> None:
    torch.manual_seed(length)
    raw = torch.rand(2, entries).double()
    limit = torch.tensor([entries, entries // 2])
    given = raw.masked_fill(torch.arange(entries) >= limit[:, None], float("nan"))
    pooled = ema_pool(given, length, limit)
    for head in range(2):
        for j in range(entries):
            if j >= limit[head]:
                assert pooled[head, j] == float("-inf")
                continue
            near = range(max(0, j - after + 1), min(int(limit[head]), j + before))
            rate = [1 / length if i <= j else 1 / max(1.0, length / 2) for i in near]
            terms = [
                math.exp(-abs(j - i) * r) * float(raw[head, i])
                for i, r in zip(near, rate, strict=True)
            ]
            # Float64: a few roundings of numbers about 10.
            assert float(pooled[head, j]) == pytest.approx(math.fsum(terms), rel=1e-13)


def test_moving_average_hands_a_score_on_twice_as_far_as_back() -> None:
    raw = torch.zeros(1, 41)
    raw[0, 20] = 1.0
    pooled = ema_pool(raw, 8)[0]
    assert pooled[20] == 1.0
    torch.testing.assert_close(pooled[28], pooled[16])
    assert pooled[28].item() == pytest.approx(math.exp(-1))
    assert raw.sum() == 1.0


@pytest.mark.parametrize(
    ("length", "after", "before"), [(1, 16, 16), (2, 32, 16), (5, 128, 64), (1000, 16384, 8192)]
)
@pytest.mark.parametrize("entries", [1, 7, 300])
def test_by_places_distances_are_those_of_the_places(
    length: int, after: int, before: int, entries: int
) -> None:
    torch.manual_seed(entries)
    raw = torch.rand(2, entries).double()
    steps = torch.randint(1, 30, (2, entries)) + BREAK * (torch.rand(2, entries) < 0.03)
    limit = torch.tensor([entries, entries // 2])
    beyond = torch.arange(entries) >= limit[:, None]
    places = steps.cumsum(1).masked_fill(beyond, -(2**30)).int()
    pooled = pool_scores(raw.masked_fill(beyond, float("nan")), length, "word", limit, places)
    for head in range(2):
        for j in range(entries):
            if j >= limit[head]:
                assert pooled[head, j] == LOWEST
                continue
            terms = []
            for i in range(max(0, j - after + 1), min(int(limit[head]), j + before)):
                far = abs(int(places[head, j] - places[head, i]))
                fall = length if i <= j else max(1.0, length / 2)
                if far < BREAK:
                    terms.append(math.exp(-far / (16 * fall)) * float(raw[head, i]))
            # Float64: a few roundings of numbers about 10.
            assert float(pooled[head, j]) == pytest.approx(math.fsum(terms), rel=1e-13)


def test_pooling_by_kind() -> None:
    raw = torch.rand(2, 30)
    limit = torch.tensor([30, 12])
    assert pool_scores(raw, 5, "max", limit).equal(max_pool(raw, 5, limit))
    assert pool_scores(raw, 6, "ema", limit).equal(ema_pool(raw, 6, limit))
    places = torch.arange(30, dtype=torch.int32).expand(2, -1)
    assert pool_scores(raw, 6, "word", limit, places).equal(ema_pool(raw, 6, limit, places))
    assert pool_scores(raw, 6, "ema", limit, places).equal(ema_pool(raw, 6, limit))
    with pytest.raises(ValueError, match="needs the place of every entry"):
        pool_scores(raw, 6, "word", limit)
    with pytest.raises(ValueError, match=r"places like raw \[2, 30\], got \[2, 4\]"):
        pool_scores(raw, 6, "word", limit, places[:, :4])
    with pytest.raises(ValueError, match="kind must be one of"):
        pool_scores(raw, 5, "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        ema_pool(raw, 0)
    with pytest.raises(ValueError, match=r"ema_pool needs raw \[H, N\]"):
        ema_pool(raw[0], 3)


def test_pooling_without_a_limit_takes_every_entry():
    raw = torch.randn(3, 20, dtype=torch.float64)
    assert max_pool(raw, 5).equal(max_pool(raw, 5, torch.full((3,), 20)))
    assert max_pool(raw, 1).equal(raw)
    assert max_pool(torch.empty(2, 0), 5).shape == (2, 0)


def test_pooling_leaves_its_input_alone():
    raw = torch.randn(2, 9)
    before = raw.clone()
    max_pool(raw, 3, torch.tensor([4, 9]))
    assert raw.equal(before)


@pytest.mark.parametrize("width", [0, -1, 2, 8])
def test_pooling_width_must_be_odd(width):
    with pytest.raises(ValueError, match=f"positive odd number, got {width}"):
        max_pool(torch.rand(1, 4), width)


def test_pooling_wrong_shapes():
    with pytest.raises(ValueError, match=r"got \[2, 4\], \[3\]"):
        max_pool(torch.rand(2, 4), 3, torch.tensor([1, 1, 1]))
