"""Policies: the registry, what each one prefers, how each one deals."""

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from uncomp import policies
from uncomp.kernels.select import max_pool
from uncomp.kernels.window_scores import window_scores
from uncomp.policies import LayerView, registry
from uncomp.policies.adakv import _bisected, _ranked

quick = settings(deadline=None, max_examples=60)

ALL = [
    "adakv", "entropy", "hybrid",
    "key_difference", "key_norm", "prerope_key_difference", "random",
    "streaming", "uniform",
]  # fmt: skip
QUERY_FREE = ["key_difference", "key_norm", "prerope_key_difference", "random", "streaming"]


def make_view(heads=3, entries=40, size=16, lengths=(40, 33, 12), seed=0, **changes) -> LayerView:
    """A layer with NaN keys and wild positions in the padding."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(heads, entries, size, generator=generator)
    positions = torch.arange(entries).repeat(heads, 1)
    count = torch.tensor(lengths)
    padding = torch.arange(entries) >= count[:, None]
    keys[padding] = float("nan")
    positions[padding] = -(2**62)
    view = LayerView(
        layer=4,
        keys=keys,
        lengths=count,
        positions=positions,
        queries=torch.randn(heads, 3, 4, size, generator=generator),
        query_positions=torch.arange(36, 40),
        scale=size**-0.5,
        entropy=torch.linspace(0.2, 0.8, heads),
    )
    return replace(view, **changes)


def deal(policy, view, total, minimum=0, maximum=1000, block_size=4, pooled=None) -> list[int]:
    heads = len(view.lengths)
    pooled = policy.score(view) if pooled is None else pooled
    bounds = (torch.full((heads,), bound) for bound in (minimum, maximum))
    return policy.deal(view, pooled, view.valid(), total, *bounds, block_size).tolist()


class TestRegistry:
    def test_names(self):
        assert list(policies.NAMES) == ALL

    @pytest.mark.parametrize("name", ALL)
    def test_every_name_makes_a_fresh_policy(self, name):
        policy = policies.get(name)
        assert policy.name == name
        assert policy is not policies.get(name)
        assert policy == policies.get(name)

    def test_unknown_name_lists_all(self):
        with pytest.raises(ValueError, match=f"'snapkv'; allowed: {', '.join(ALL)}"):
            policies.get("snapkv")

    def test_unknown_setting_lists_the_allowed_ones(self):
        with pytest.raises(
            ValueError, match="'group'; allowed: reduce, over, groups, ratio, reverse"
        ):
            policies.get("entropy", group=3)
        with pytest.raises(ValueError, match="'seed'; allowed: none"):
            policies.get("streaming", seed=3)

    @pytest.mark.parametrize(
        ("name", "settings"),
        [
            ("entropy", {"groups": 0}),
            ("entropy", {"ratio": 0.5}),
            ("entropy", {"ratio": float("nan")}),
            ("adakv", {"floor": 1.5}),
            ("adakv", {"equal_from": -1}),
            ("hybrid", {"attention_share": 0.0}),
            ("hybrid", {"over": "mean"}),
            ("uniform", {"reduce": "mean"}),
        ],
        ids=str,
    )
    def test_bad_values_are_rejected_at_once(self, name, settings):
        with pytest.raises(ValueError, match=r"must be"):
            policies.get(name, **settings)

    def test_a_new_policy_is_one_registered_dataclass(self, monkeypatch):
        monkeypatch.setattr(registry, "_POLICIES", dict(registry._POLICIES))

        @policies.register
        @dataclass(frozen=True)
        class Oldest(policies.Policy):
            name: ClassVar[str] = "oldest"

            def score(self, view: LayerView) -> Tensor:
                return -view.positions.float()

        assert isinstance(policies.get("oldest"), Oldest)
        assert "oldest" in policies.names()
        with pytest.raises(ValueError, match="'oldest' is already registered by"):
            policies.register(type("Other", (Oldest,), {}))
        with pytest.raises(TypeError, match="must be a dataclass"):
            policies.register(type("Plain", (), {"name": "plain"}))

    @pytest.mark.parametrize("name", ALL)
    def test_flags(self, name):
        policy = policies.get(name)
        assert policy.needs_queries == (name not in QUERY_FREE)
        assert policy.needs_rotary == (name in ("prerope_key_difference", "hybrid"))
        assert policy.pool_scores == (policy.needs_queries or policy.needs_rotary)
        assert policy.needs_entropy == (name == "entropy")


class TestScores:
    @pytest.mark.parametrize("name", ALL)
    def test_shape_dtype_and_padding(self, name):
        view = make_view()
        score = policies.get(name).score(view)
        assert score.shape == view.positions.shape
        assert score.dtype == torch.float32
        assert not score.isnan().any()
        assert score[view.valid()].isfinite().all()

        keys, positions = view.keys.clone(), view.positions.clone()
        keys[~view.valid()] = 7.0
        positions[~view.valid()] = 3
        other = policies.get(name).score(replace(view, keys=keys, positions=positions))
        assert other[view.valid()].equal(score[view.valid()])

    @pytest.mark.parametrize("name", QUERY_FREE)
    def test_query_free_policies_do_without_queries(self, name):
        view = make_view()
        without = replace(view, queries=None, query_positions=None)
        assert policies.get(name).score(without).equal(policies.get(name).score(view))

    @pytest.mark.parametrize("name", ["adakv", "entropy", "uniform"])
    def test_attention_policies_use_the_window_scores(self, name):
        view = make_view(softcap=3.0)
        for reduce, over in itertools.product(("sum", "max"), repeat=2):
            expected = window_scores(
                view.queries,
                view.keys,
                view.lengths,
                view.positions,
                view.query_positions,
                view.scale,
                3.0,
                reduce,
                over,
            )
            assert policies.get(name, reduce=reduce, over=over).score(view).equal(expected)
        with pytest.raises(ValueError, match=f"'{name}' needs the queries of layer 4"):
            policies.get(name).score(replace(view, queries=None))

    def test_streaming_prefers_the_newest(self):
        view = make_view()
        score = policies.get("streaming").score(view)
        for head, length in enumerate(view.lengths.tolist()):
            assert (score[head, :length].diff() > 0).all()

    def test_key_norm_prefers_small_keys(self):
        view = make_view()
        score = policies.get("key_norm").score(view)
        torch.testing.assert_close(score[1, 5], -view.keys[1, 5].norm())

    def test_key_difference_prefers_keys_unlike_the_mean(self):
        view = make_view(1, 5, 2, [5])
        keys = torch.tensor([[[1.0, 0.1], [9.0, -0.3], [1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]]])
        score = policies.get("key_difference").score(replace(view, keys=keys))
        assert score[0].argsort(descending=True)[:2].tolist() == [3, 4]
        anchor = torch.nn.functional.normalize(keys[0], dim=-1).mean(0)
        expected = -torch.nn.functional.cosine_similarity(keys[0], anchor[None], dim=-1)
        torch.testing.assert_close(score[0], expected)

    def test_random_depends_on_seed_layer_head_and_position_only(self):
        view = make_view(lengths=(40, 40, 40))
        score = policies.get("random").score(view)
        assert score.equal(policies.get("random").score(make_view(lengths=(40, 40, 40), seed=9)))
        shifted = replace(view, positions=view.positions + 7)
        assert policies.get("random").score(shifted)[:, :-7].equal(score[:, 7:])
        for other in (
            policies.get("random", seed=1).score(view),
            policies.get("random").score(replace(view, layer=5)),
            score.roll(1, 0),
        ):
            assert (other == score).sum() < 3

    def test_random_is_uniform(self):
        view = make_view(4, 20_000, 1, [20_000] * 4)
        score = policies.get("random").score(view)
        assert score.min() >= 0
        assert score.max() < 1
        histogram = torch.histc(score, 10, 0, 1) / score.numel()
        assert (histogram - 0.1).abs().max() < 0.005
        assert torch.corrcoef(score).fill_diagonal_(0).abs().max() < 0.03

    @pytest.mark.parametrize("name", ["key_difference", "key_norm"])
    def test_float64_keys_are_scored_in_float64(self, name):
        view = make_view()
        double = replace(view, keys=view.keys.double())
        assert policies.get(name).score(double).dtype == torch.float64


class TestDealing:
    @pytest.mark.parametrize("name", ["uniform", *QUERY_FREE])
    def test_equal_shares(self, name):
        assert deal(policies.get(name), make_view(), 10) == [4, 3, 3]

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"groups": 2, "ratio": 2.0}, [8, 4, 8, 4]),
            ({"groups": 2, "ratio": 2.0, "reverse": True}, [4, 8, 4, 8]),
            ({"groups": 4, "ratio": 5.0}, [10, 2, 7, 5]),
            ({"groups": 8, "ratio": 5.0}, [10, 2, 7, 5]),  # no more groups than heads
            ({"groups": 1, "ratio": 5.0}, [6, 6, 6, 6]),
            ({"groups": 4, "ratio": 1.0}, [6, 6, 6, 6]),
        ],
        ids=str,
    )
    def test_entropy_groups(self, settings, expected):
        view = make_view(4, lengths=[40] * 4, entropy=torch.tensor([0.9, 0.1, 0.7, 0.3]))
        assert deal(policies.get("entropy", **settings), view, 24) == expected

    def test_entropy_respects_the_bounds(self):
        view = make_view(4, lengths=[40] * 4, entropy=torch.tensor([0.9, 0.1, 0.7, 0.3]))
        policy = policies.get("entropy", groups=4, ratio=5.0)
        assert deal(policy, view, 24, minimum=4, maximum=8) == [8, 4, 7, 5]

    def test_entropy_is_required(self):
        with pytest.raises(ValueError, match="head entropies of layer 4"):
            deal(policies.get("entropy"), make_view(entropy=None), 9)

    def test_adakv_counts_the_best_scores_of_the_layer(self):
        view = make_view(3, 8, 16, [8, 8, 8], query_positions=torch.arange(4, 8))
        pooled = torch.tensor([[9.0] * 8, [8.0] * 4 + [0.0] * 4, [1.0] * 8])
        policy = policies.get("adakv", floor=0.0)
        assert deal(policy, view, 3, pooled=pooled) == [2, 1, 0]
        assert deal(policies.get("adakv"), view, 3, pooled=pooled) == [2, 1, 0]
        assert deal(policies.get("adakv", floor=1.0), view, 3, pooled=pooled) == [1, 1, 1]

    def test_adakv_floor_protects_poor_heads(self):
        view = make_view(2, 100, 16, [100, 100])
        pooled = torch.stack([torch.full((100,), 2.0), torch.ones(100)])
        assert deal(policies.get("adakv", floor=0.0), view, 20, pooled=pooled) == [20, 0]
        assert deal(policies.get("adakv"), view, 20, pooled=pooled) == [18, 2]

    def test_adakv_shares_equally_where_there_is_enough(self):
        view = make_view(2, 100, 16, [100, 100])
        pooled = torch.stack([torch.full((100,), 2.0), torch.ones(100)])
        policy = policies.get("adakv", equal_from=40)  # 10 blocks of 4
        assert deal(policy, view, 19, pooled=pooled) == [18, 1]
        assert deal(policy, view, 20, pooled=pooled) == [10, 10]
        assert deal(policy, view, 24, minimum=12, pooled=pooled) == [12, 12]

    def test_adakv_shares_layer_by_layer(self):
        pooled = torch.tensor([[[2.0] * 40, [1.0] * 40]] * 2)
        policy = policies.get("adakv", floor=0.0, equal_from=16)
        low, high = torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 10)
        eligible = torch.ones(2, 2, 40, dtype=torch.bool)
        shares = policy.share(None, pooled, eligible, torch.tensor([7, 8]), low, high, 4)
        assert shares.tolist() == [[7, 0], [4, 4]]

    def test_adakv_never_counts_ineligible_entries(self):
        view = make_view()
        pooled = max_pool(torch.rand(3, 40), 7, view.lengths)
        poisoned = pooled.masked_fill(~view.valid(), float("nan"))
        policy = policies.get("adakv")
        assert deal(policy, view, 9, pooled=poisoned) == deal(policy, view, 9, pooled=pooled)


@quick
@given(
    st.sampled_from(ALL),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=8),
    st.integers(0, 60),
    st.integers(0, 999),
)
def test_every_policy_deals_exactly_and_within_bounds(name, bounds, extra, seed):
    heads = len(bounds)
    view = make_view(heads, 30, 4, [30] * heads, seed, query_positions=torch.arange(26, 30))
    minimum = torch.tensor([low for low, _ in bounds])
    maximum = torch.tensor([low + room for low, room in bounds])
    total = int(minimum.sum()) + extra
    policy = policies.get(name)
    result = policy.deal(view, policy.score(view), view.valid(), total, minimum, maximum, 4)
    assert result.dtype == torch.int64
    assert int(result.sum()) == min(total, int(maximum.sum()))
    assert ((minimum <= result) & (result <= maximum)).all()


@pytest.mark.parametrize("rows", [1, 3])
def test_ranked_is_a_place_in_the_sorted_row(rows):
    """On the host, and bit by bit as on a device; infinities, ties and both zeros included."""
    torch.manual_seed(rows)
    for width in (1, 2, 17, 60):
        score = torch.randn(rows, 2, width)
        score[torch.rand(score.shape) < 0.3] = 0.0
        score[torch.rand(score.shape) < 0.1] = -0.0
        score[torch.rand(score.shape) < 0.1] = float("-inf")
        score[torch.rand(score.shape) < 0.1] = float("inf")
        rank = torch.randint(1, width + 1, (rows, 2))
        ordered = score.sort(-1, descending=True).values
        expected = ordered.gather(-1, rank.unsqueeze(-1) - 1).squeeze(-1)
        assert (_ranked(score, rank) == expected).all()
        assert (_bisected(score, rank) == expected).all()


class TestHybrid:
    def test_takes_from_both_lists_in_turn(self):
        policy = policies.get("hybrid", attention_share=0.5)
        attention = torch.tensor([[9.0, 8.0, 7.0, 6.0, 0.0, 0.0, 0.0, 0.0]])
        keys = torch.tensor([[0.0, 9.0, 0.0, 0.0, 0.0, 0.0, 7.0, 8.0]])
        score = policy.combine([attention, keys], torch.ones(1, 8, dtype=torch.bool))
        # First of both lists: 0 and 1; second: 1 again and 7; third: 2 and 6.
        assert score.argsort(descending=True, stable=True)[0, :5].tolist() == [0, 1, 7, 2, 6]

    @pytest.mark.parametrize(("share", "first"), [(0.75, [0, 7, 1, 2, 3]), (0.25, [0, 7, 6, 5, 1])])
    def test_shares(self, share, first):
        policy = policies.get("hybrid", attention_share=share)
        attention = torch.arange(8.0, 0, -1)[None]
        score = policy.combine([attention, attention.flip(1)], torch.ones(1, 8, dtype=torch.bool))
        assert score.argsort(descending=True, stable=True)[0, :5].tolist() == first

    def test_only_eligible_entries_have_ranks_and_nan_is_last(self):
        policy = policies.get("hybrid", attention_share=0.5)
        attention = torch.tensor([[9.0, float("nan"), 7.0, 6.0]])
        keys = torch.tensor([[9.0, 1.0, 0.0, float("-inf")]])
        among = torch.tensor([[False, True, True, True]])
        score = policy.combine([attention, keys], among)[0]
        assert score[[1, 2, 3]].tolist() == [0.0, 0.0, -2.0]
