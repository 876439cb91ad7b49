"""When a request is compacted and how many blocks stay."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uncomp.config import UncompConfig
from uncomp.plan import Target
from uncomp.request import RequestSettings


def target(
    keep: float | None = None,
    budget: int | None = None,
    block_size: int = 16,
    protect: tuple[tuple[int, int], ...] = (),
    compress: bool = True,
    compact_at: int | None = None,
    **settings: int | bool,
) -> Target:
    given = {"window": 8, "recent": 8, "sinks": 4, "min_tokens": 1, "recompact_every": 64}
    given |= settings
    own = RequestSettings(compress, keep, budget, protect, compact_at=compact_at)
    return Target(settings=own, block_size=block_size, **given)  # type: ignore[arg-type]


@st.composite
def targets(draw: st.DrawFn) -> Target:
    window, sinks = draw(st.integers(1, 40)), draw(st.integers(0, 20))
    recent = draw(st.sampled_from([window, 1, 50]))
    keep, budget = draw(st.floats(0.01, 1)), None
    if draw(st.booleans()):
        keep, budget = None, draw(st.integers(recent + sinks, 2000))
    spans = draw(st.sampled_from([(), ((0, 30),), ((3, 9), (100, 160))]))
    return target(
        keep,
        budget,
        block_size=draw(st.sampled_from([1, 2, 16, 32, 128])),
        protect=spans,
        window=window,
        recent=recent,
        sinks=sinks,
        min_tokens=draw(st.integers(1, 300)),
        recompact_every=draw(st.integers(0, 600)),
    )


LENGTHS = st.integers(1, 5000)


@given(targets(), LENGTHS)
def test_held_tokens_are_within_a_block_of_the_budget(plan: Target, tokens: int) -> None:
    """Kept blocks and tail hold the budget, rounded up to a block, unless the length or what must
    stay says otherwise."""
    full = tokens // plan.block_size
    tail = tokens % plan.block_size
    kept = plan.kept_blocks(tokens)
    forced = plan.sinks + plan.recent + plan.settings.protected_tokens
    assert 0 <= kept <= full
    budget = plan.budget_tokens(tokens)
    least = max(1, math.ceil(forced / plan.block_size))
    if least < kept < full:
        assert budget <= kept * plan.block_size + tail < budget + plan.block_size
    elif kept == full:
        assert full <= least or budget > (full - 1) * plan.block_size + tail
    else:
        assert kept == least


@given(targets(), LENGTHS)
def test_every_head_has_room_for_what_must_stay(plan: Target, tokens: int) -> None:
    forced = plan.sinks + plan.recent + plan.settings.protected_tokens
    kept = plan.kept_blocks(tokens) * plan.block_size
    assert kept >= min(forced, tokens // plan.block_size * plan.block_size)


@given(targets(), LENGTHS, st.integers(1, 40))
def test_worthwhile_means_that_a_block_comes_back(plan: Target, tokens: int, held: int) -> None:
    if plan.worthwhile(tokens, held):
        assert tokens >= plan.min_tokens
        assert plan.kept_blocks(tokens) < held


@given(targets(), LENGTHS, LENGTHS)
def test_first_trigger_is_the_first_length_that_frees_a_block(
    plan: Target, known: int, more: int
) -> None:
    limit = known + more
    trigger = plan.first_trigger(known, limit)
    borders = range((known // plan.block_size + 1) * plan.block_size, limit + 1, plan.block_size)
    lengths = [known, *borders]
    frees = [n for n in lengths if plan.worthwhile(n, n // plan.block_size)]
    assert trigger == (frees[0] if frees else None)


@given(targets(), LENGTHS)
def test_next_trigger_leaves_a_window_and_a_block(plan: Target, tokens: int) -> None:
    trigger = plan.next_trigger(tokens)
    if plan.recompact_every == 0:
        assert trigger is None
        return
    assert trigger is not None
    assert trigger - tokens >= plan.window
    assert trigger // plan.block_size > tokens // plan.block_size
    growth = max(plan.recompact_every, plan.block_size)
    assert trigger - tokens <= max(growth, plan.window)


@given(targets(), LENGTHS)
def test_a_compacted_request_does_not_shrink_below_its_budget(plan: Target, tokens: int) -> None:
    """The next compaction frees blocks only if the tail has grown past them."""
    kept = plan.kept_blocks(tokens)
    trigger = plan.next_trigger(tokens)
    if trigger is None:
        return
    held = kept + trigger // plan.block_size - tokens // plan.block_size
    if plan.settings.budget is not None and plan.worthwhile(trigger, held):
        assert plan.kept_blocks(trigger) < held


@pytest.mark.parametrize(
    ("plan", "tokens", "kept"),
    [
        (target(keep=0.25), 1024, 16),
        (target(keep=0.25), 1039, 16),  # ceil(259.75) = 260 - 15 in the tail = 245
        (target(keep=1.0), 1024, 64),
        (target(budget=256), 1024, 16),
        (target(budget=256), 1025, 16),
        (target(budget=256), 1032, 16),
        (target(budget=256), 100, 6),
        (target(budget=12), 1039, 1),
        (target(budget=12, protect=((0, 100),)), 1024, 7),  # 4 + 8 + 100 tokens
        (target(keep=0.1, relocate=True), 1024, 64),
        (target(keep=0.5), 15, 0),
    ],
)
def test_kept_blocks(plan: Target, tokens: int, kept: int) -> None:
    assert plan.kept_blocks(tokens) == kept


def test_triggers() -> None:
    prompt = target(keep=0.25, min_tokens=256)
    assert prompt.first_trigger(1000, 4096) == 1000
    assert prompt.first_trigger(10, 4096) == 256
    assert prompt.first_trigger(10, 255) is None
    assert target(keep=0.25, compress=False).first_trigger(1000, 4096) is None
    # A budget of 256 holds a prompt of 200; blocks come back from the 17th full block on.
    assert target(budget=256).first_trigger(200, 4096) == 272
    assert prompt.next_trigger(1000) == 62 * 16 + 64
    assert target(keep=0.5, recompact_every=16, window=40).next_trigger(1000) == 1040
    assert target(keep=0.5, recompact_every=0).next_trigger(1000) is None


def test_a_place_that_is_asked_for_comes_first_if_it_frees_anything() -> None:
    asked = target(keep=0.25, min_tokens=256, compact_at=300)
    assert (asked.place, asked.first_trigger(1000, 4096)) == (300, 300)
    # Shorter than min_tokens: as if it had not been asked for.
    early = target(keep=0.25, min_tokens=256, compact_at=255)
    assert (early.place, early.first_trigger(1000, 4096)) == (None, 1000)
    assert target(keep=0.25, compress=False, compact_at=300).first_trigger(1000, 4096) is None


def test_relocation_moves_every_full_block_whenever_there_is_one() -> None:
    plan = target(keep=1.0, relocate=True)
    assert [plan.worthwhile(n, n // 16) for n in (15, 16, 1000)] == [False, True, True]


def test_target_of_a_configuration() -> None:
    config = UncompConfig(keep=0.5, window=16, sinks=2, min_tokens=77, recompact_every=5)
    settings = RequestSettings(True, 0.5, None)
    expected = Target(settings, 16, 16, 2, 77, 5, 32, False)
    assert Target.of(settings, config, 32) == expected
    fewer = Target.of(settings, replace(config, recent=5), 32)
    assert (fewer.window, fewer.recent) == (16, 5)
