"""Numbers from forced tokens, against the definitions over a whole vocabulary."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uncomp.eval.tasks.teacher_forcing import (
    EPSILON,
    TokenRecord,
    from_json,
    kl,
    nll,
    scored_values,
    to_json,
    top1_agreement,
)


def distribution(seed: int, vocabulary: int, sharpness: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    return logits.log_softmax(0)


def record(logprobs: torch.Tensor, k: int, forced: int = 0) -> TokenRecord:
    values, ids = logprobs.topk(k)
    return TokenRecord(float(logprobs[forced]), tuple(ids.tolist()), tuple(values.tolist()))


def true_kl(full: torch.Tensor, compressed: torch.Tensor) -> float:
    return float(torch.nn.functional.kl_div(compressed, full, reduction="sum", log_target=True))


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0, 20.0])
def test_kl_is_exact_if_the_lists_are_the_vocabulary(sharpness: float) -> None:
    full, compressed = distribution(1, 50, sharpness), distribution(2, 50, sharpness)
    # 1e-9: 50 float64 terms; the rest bucket holds their rounding only.
    assert kl([record(full, 50)], [record(compressed, 50)]) == pytest.approx(
        true_kl(full, compressed), abs=1e-9
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.integers(2, 200),
    k=st.integers(1, 64),
    sharpness=st.floats(0.01, 8),
    mix=st.floats(0, 1),
    stored=st.booleans(),
)
def test_kl_is_a_lower_bound(
    seed: int, vocabulary: int, k: int, sharpness: float, mix: float, stored: bool
) -> None:
    full, other = (distribution(seed + i, vocabulary, sharpness) for i in (0, 1))
    compressed = (full + mix * other).log_softmax(0)  # mix 0: the same distribution
    records = [record(p, min(k, vocabulary)) for p in (full, compressed)]
    if stored:
        records = [from_json(to_json([r]))[0] for r in records]
    bound = kl(records[:1], records[1:])
    # 1e-9: float64 rounding. Stored masses are off by up to EPSILON / 2, which matters where the
    # rest bucket's compressed mass is that small; 1e-3 is above all that these examples reach.
    assert 0 <= bound <= true_kl(full, compressed) + (1e-3 if stored else 1e-9)


def test_more_tokens_give_a_tighter_bound() -> None:
    full = distribution(3, 1000, 2.0)
    compressed = (full + 0.3 * distribution(4, 1000, 2.0)).log_softmax(0)
    bounds = [kl([record(full, k)], [record(compressed, k)]) for k in (1, 8, 64, 1000)]
    assert bounds == sorted(bounds)
    assert bounds[2] > 0.5 * true_kl(full, compressed)


@pytest.mark.parametrize("k", [1, 5, 64])
def test_the_same_records_give_exactly_zero(k: int) -> None:
    for sharpness in (0.1, 3.0, 40.0):  # 40: the rest mass is below EPSILON
        records = [record(distribution(seed, 100, sharpness), k) for seed in range(20)]
        for same in (records, list(from_json(to_json(records)))):
            values = scored_values(same, same)
            assert values["kl"] == 0
            assert values["nll_increase"] == 0
            assert values["top1_agreement"] == 1


def test_a_rest_of_rounding_noise_invents_no_divergence() -> None:
    full = TokenRecord(-0.1, (0, 1), (math.log(0.6), math.log(0.4 - 4e-6)))
    compressed = TokenRecord(-0.1, (0, 1), (math.log(0.6), math.log(0.4 + 1e-9)))
    assert kl([full], [compressed]) < EPSILON


def test_no_common_token_says_nothing() -> None:
    full, compressed = TokenRecord(-1.0, (1,), (-0.1,)), TokenRecord(-1.0, (2,), (-0.1,))
    assert kl([full], [compressed]) == 0
    assert top1_agreement([full], [compressed]) == 0


def test_kl_is_of_full_relative_to_compressed() -> None:
    full = TokenRecord(-1.0, (0, 1), (math.log(0.9), math.log(0.1)))
    compressed = TokenRecord(-1.0, (1, 0), (math.log(0.5), math.log(0.5)))
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert kl([full], [compressed]) == pytest.approx(expected, abs=1e-12)


def test_nll_is_the_mean_over_the_tokens_after_the_skipped() -> None:
    records = [TokenRecord(-v, (0,), (-0.5,)) for v in (9.0, 1.0, 2.0)]
    assert nll(records, skip=1) == pytest.approx(1.5)
    assert nll(records) == pytest.approx(4.0)


def test_scored_values_name_what_they_are() -> None:
    full = [TokenRecord(-v, (1, 2), (-0.2, -2.0)) for v in (5.0, 1.0, 1.0)]
    compressed = [
        TokenRecord(-1.0, (3, 1), (-0.1, -3.0)),  # skipped
        TokenRecord(-2.0, (1, 2), (-0.3, -1.5)),
        TokenRecord(-4.0, (2, 1), (-0.3, -1.5)),
    ]
    values = scored_values(full, compressed, skip=1)
    assert set(values) == {"nll", "nll_increase", "kl", "top1_agreement"}
    assert values["nll"] == pytest.approx(3.0)
    assert values["nll_increase"] == pytest.approx(2.0)
    assert values["top1_agreement"] == 0.5
    assert values["kl"] == pytest.approx(kl(full[1:], compressed[1:]))


def test_tied_tokens_agree_in_any_order() -> None:
    one, other = TokenRecord(-1.0, (7, 8), (-1.0, -1.0)), TokenRecord(-1.0, (8, 9), (-0.5, -2.0))
    assert top1_agreement([one], [other]) == 1


def test_json_keeps_values_within_the_rounding() -> None:
    records = [record(distribution(seed, 500, 3.0), 64, forced=seed) for seed in range(16)]
    text = json.dumps(to_json(records))
    again = from_json(json.loads(text))
    assert [r.top_ids for r in again] == [r.top_ids for r in records]
    for name in ("forced", "top_logprobs"):
        was, now = (np.array([getattr(r, name) for r in x]) for x in (records, again))
        assert np.abs(was - now).max() <= EPSILON / 2 + 1e-12
    assert len(text) / len(records) < 64 * 20  # bytes a token, k = 64


@pytest.mark.parametrize("function", [kl, top1_agreement, scored_values])
def test_different_lengths_are_an_error(function) -> None:
    one = TokenRecord(-1.0, (0,), (-0.5,))
    with pytest.raises(ValueError, match=r"2 tokens were forced .* and 1 with"):
        function([one, one], [one])


@pytest.mark.parametrize("skip", [-1, 2, 3])
def test_nothing_left_to_score_is_an_error(skip: int) -> None:
    one = TokenRecord(-1.0, (0,), (-0.5,))
    with pytest.raises(ValueError, match=f"cannot skip {skip} of 2"):
        nll([one, one], skip)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((-1.0, (), ()), "at least one"),
        ((-1.0, (1, 2), (-0.5,)), "got 2 and 1"),
        ((-1.0, (1, 1), (-0.5, -0.6)), "must differ"),
        ((math.nan, (1,), (-0.5,)), "no log-probability"),
        ((-1.0, (1,), (-math.inf,)), "no log-probability"),
        ((0.3, (1,), (-0.5,)), "no log-probability"),
    ],
    ids=["empty", "lengths", "repeated", "nan", "infinite", "above-0"],
)
def test_impossible_records_are_errors(arguments, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TokenRecord(*arguments)


@pytest.mark.parametrize("value", [None, 3, [None], [[1.0, 2]], [["x", [1], [2.0]]]])
def test_other_json_is_an_error(value) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - which part is wrong is Python's to say
        from_json(value)
