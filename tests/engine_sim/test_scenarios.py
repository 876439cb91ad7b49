"""One situation at a time: what must happen to blocks and state when requests meet compactions."""

from typing import Any

import pytest
from fake_runner import Shape, token_gaps
from simulate import Setup, Simulation

from uncomp.engine.orders import ATTRIBUTE, PruningReceipt, Receipt, StepPlan
from uncomp.kernels.select import BREAK, UNIT
from uncomp.spans import places

PROMPT = list(range(1, 11)) * 4  # 40 tokens, 10 blocks


def simulation(
    lag: int = 0,
    blocks: int = 64,
    wide_rows: bool = False,
    apart: bool = False,
    **settings: Any,
) -> Simulation:
    base = {"keep": 0.25, "policy": "uniform", "pooling": 1, "min_tokens": 8, "window": 2}
    given = base | {"sinks": 1, "recompact_every": 0} | settings
    if "budget" in settings:
        del given["keep"]
    return Simulation(
        Setup(
            settings=given,
            shape=Shape(blocks),
            asynchronous=lag > 0,
            lag=lag,
            max_num_batched_tokens=64,
            stop=False,
            wide_rows=wide_rows,
            apart=apart,
        )
    )


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_blocks_go_back_only_after_the_worker_confirmed(lag: int) -> None:
    sim = simulation(lag)
    sim.add("a", PROMPT, 20)
    free = []
    sim.step(lambda moment: free.append(sim.pool.get_num_free_blocks()))
    assert free[0] == 63 - 10
    while sim.planner.tracked["a"].pending is not None:
        row = sim.manager.req_to_blocks["a"]
        assert not any(block.is_null for block in row)
        sim.step()
    # 10 full blocks, budget ceil(0.25 * 40) = 10 tokens = 3 blocks
    assert [block.is_null for block in sim.manager.req_to_blocks["a"][:10]] == [True] * 7 + [
        False
    ] * 3
    sim.drain()


def test_freed_blocks_admit_more_requests() -> None:
    """Three prompts of 10 blocks fit into 26 only if the first two were compacted."""
    together = {}
    for compress in (True, False):
        sim = simulation(blocks=27)
        for i in range(3):
            prompt = [11 - i] * 3 + PROMPT[3:]
            sim.add(f"r{i}", prompt, 12, kv_compress=compress)
        together[compress] = 0
        while sim.scheduler.has_requests() or sim.in_flight:
            sim.step()
            together[compress] = max(together[compress], len(sim.scheduler.running))
        sim.drain()
    assert together == {True: 3, False: 2}


def test_duplicates_share_until_compacted() -> None:
    """n > 1: the copies share the prompt's blocks; whoever writes first gets blocks of its own."""
    sim = simulation()
    sim.add("a", PROMPT, 20, kv_compress=False)
    sim.step()
    sim.add("b", PROMPT, 20)
    sim.step()
    shared = {b.block_id for b in sim.manager.req_to_blocks["a"]}
    kept = {b.block_id for b in sim.manager.req_to_blocks["b"] if not b.is_null}
    assert sim.happened["hits"] == 1
    assert sim.happened["exchanged"] == 2  # the last block of the three was never shared
    assert not shared & kept
    sim.drain()


def test_freed_prefix_is_a_hit_and_survivors_are_not() -> None:
    sim = simulation()
    sim.add("a", PROMPT, 30)
    for _ in range(5):
        sim.step()
    sim.add("b", PROMPT, 30)
    (new,) = sim.scheduler.schedule().scheduled_new_reqs
    # 7 of 10 blocks were given back and are hashed still; 3 hold survivors.
    assert new.num_computed_tokens == 28


@pytest.mark.parametrize(("window", "cached"), [(1, 36), (2, 36), (4, 36), (5, 32), (9, 28)])
def test_a_hit_leaves_the_window_to_compute(window: int, cached: int) -> None:
    sim = simulation(window=window, budget=20)
    sim.add("a", PROMPT, 1, kv_compress=False)
    while sim.scheduler.has_requests() or sim.in_flight:
        sim.step()
    sim.add("b", PROMPT, 1)
    output = sim.scheduler.schedule()
    assert output.scheduled_new_reqs[0].num_computed_tokens == cached


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("place", [21, 24, -16])
def test_compaction_in_the_middle_of_a_prompt(lag: int, place: int) -> None:
    sim = simulation(lag)
    sim.add("a", PROMPT, 5, kv_compact_at=place)
    chunks: list[int] = []
    ordered_at: list[int] = []

    def note(moment: str) -> None:
        if moment == "scheduled":
            output = sim.in_flight[-1].output
            chunks.extend(output.num_scheduled_tokens.values())
            ordered_at.extend(o.num_tokens for o in getattr(output, ATTRIBUTE).orders)

    while sim.scheduler.has_requests() or sim.in_flight:
        sim.step(note)
    at = place % 40
    assert ordered_at == [at]
    assert chunks[: 1 + 40 - at] == [at] + [1] * (40 - at)
    sim.drain()


@pytest.mark.parametrize("lag", [0, 1])
def test_where_rows_can_be_wide_what_follows_is_read_at_once(lag: int) -> None:
    sim = simulation(lag, wide_rows=True)
    sim.add("a", PROMPT, 5, kv_compact_at=21)
    chunks: list[int] = []
    while sim.scheduler.has_requests() or sim.in_flight:
        sim.step(
            lambda moment: (
                chunks.extend(sim.in_flight[-1].output.num_scheduled_tokens.values())
                if moment == "scheduled"
                else None
            )
        )
    assert chunks[:3] == [21, 19, 1]
    sim.drain()


def test_wide_rows_end_where_the_next_compaction_is_due() -> None:
    """So that what is kept does not depend on how a prompt was cut into chunks."""
    sim = simulation(wide_rows=True, budget=12, recompact_every=8)
    sim.add("a", PROMPT, 3, kv_compact_at=20)
    ordered_at: list[int] = []
    chunks: list[int] = []

    def note(moment: str) -> None:
        if moment == "scheduled":
            output = sim.in_flight[-1].output
            chunks.extend(output.num_scheduled_tokens.values())
            ordered_at.extend(o.num_tokens for o in getattr(output, ATTRIBUTE).orders)

    while sim.scheduler.has_requests() or sim.in_flight:
        sim.step(note)
    assert ordered_at == [20, 28, 36]
    assert chunks[:4] == [20, 8, 8, 4]
    sim.drain()


def test_what_follows_the_place_is_no_prefix_hit() -> None:
    """It was read with the full cache by others, and what was read compressed is for nobody."""
    sim = simulation()
    sim.add("a", PROMPT, 1, kv_compress=False)
    while sim.scheduler.has_requests() or sim.in_flight:
        sim.step()
    sim.add("b", PROMPT, 1, kv_compact_at=22)
    assert sim.scheduler.schedule().scheduled_new_reqs[0].num_computed_tokens == 20
    fresh = simulation()
    fresh.add("a", PROMPT, 1, kv_compact_at=22)
    while fresh.scheduler.has_requests() or fresh.in_flight:
        fresh.step()
    fresh.add("b", PROMPT, 1, kv_compress=False)
    assert fresh.scheduler.schedule().scheduled_new_reqs[0].num_computed_tokens <= 20


def test_a_scheduler_that_runs_past_the_place_is_stopped() -> None:
    sim = simulation()
    sim.scheduler.need_mamba_block_aligned_split = False
    sim.add("a", PROMPT, 5, kv_compact_at=24)
    with pytest.raises(RuntimeError, match=r"after 24 tokens, but this vLLM runs tokens 0 to 40"):
        sim.step()


def test_a_place_outlives_preemption() -> None:
    sim = simulation()
    sim.add("a", PROMPT, 30, kv_compact_at=24)
    for _ in range(20):
        sim.step()
    sim.scheduler.reset_prefix_cache(reset_running_requests=True)
    while sim.planner.tracked["a"].generation != 1 or sim.happened["resumed"] == 0:
        sim.step()
    assert sim.scheduler.requests["a"].num_computed_tokens == 24
    sim.drain()


def test_opted_out_and_short_requests_stay_whole() -> None:
    sim = simulation(min_tokens=64)
    sim.add("short", PROMPT[:20], 10)
    sim.add("out", PROMPT * 2, 10, kv_compress=False)
    sim.drain()
    assert sim.happened["ordered"] == 0
    assert sim.scheduler._counters["refused_opted_out"] == 1


def test_settings_of_a_foreign_front_end_are_refused_not_fatal() -> None:
    sim = simulation()
    sim.add("a", PROMPT, 5, kv_keep=7)
    sim.drain()
    assert sim.happened["ordered"] == 0
    assert sim.scheduler._counters["refused_invalid_settings"] == 1


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_preempted_request_starts_over(lag: int) -> None:
    sim = simulation(lag)
    sim.add("a", PROMPT, 30)
    for _ in range(6):
        sim.step()
    assert sim.planner.tracked["a"].generation == 1
    sim.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert "a" not in sim.manager.compacted
    while sim.scheduler.requests["a"].num_computed_tokens < 41:
        sim.step()
    assert sim.happened["resumed"] == 1
    assert sim.planner.tracked["a"].generation == 1
    assert sim.happened["ordered"] == 2
    sim.drain()


@pytest.mark.parametrize("lag", [1, 2])
@pytest.mark.parametrize("again", [False, True], ids=["aborted", "id-used-again"])
def test_aborted_while_its_order_is_on_the_way(lag: int, again: bool) -> None:
    sim = simulation(lag)
    sim.add("a", PROMPT, 30)

    def hang_up(moment: str) -> None:
        if moment == "scheduled":
            sim.abort("a")

    sim.step(hang_up)
    assert sim.pool.get_num_free_blocks() == 63
    other = [12 - token for token in PROMPT]
    sim.add("b", other, 30)
    for _ in range(4):
        sim.step()
    if again:
        sim.add("a", PROMPT, 30)
        for _ in range(4):
            sim.step()
        assert sim.planner.tracked["a"].generation == 1
    sim.drain()


def test_no_free_block_postpones_the_order() -> None:
    sim = simulation(blocks=64)
    sim.add("a", PROMPT, 30, kv_compress=False)
    sim.step()
    sim.add("b", PROMPT, 30)
    taken = sim.pool.get_new_blocks(sim.pool.get_num_free_blocks() - 2)
    output = sim.scheduler.schedule()
    plan: StepPlan = getattr(output, ATTRIBUTE)
    assert plan.orders == []
    assert plan.record == {"b": (38, len(PROMPT))}
    assert sim.scheduler._counters["refused_no_free_block"] == 1
    assert "b" not in sim.manager.compacted
    sim.pool.free_blocks(taken)
    assert sim.planner.tracked["b"].trigger == 40


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_later_compaction_apart_writes_to_blocks_that_hold_nothing(lag: int) -> None:
    """And goes without as long as the pool has too few; what was kept stays readable until then."""
    sim = simulation(lag, blocks=17, apart=True, recompact_every=4)
    sim.add("a", PROMPT, 30)
    while sim.planner.tracked.get("a") is None or sim.planner.tracked["a"].pending is not None:
        sim.step()
    sim.add("whole", PROMPT[::-1], 4, kv_compress=False)
    postponed = 0
    while sim.scheduler.has_requests() or sim.in_flight:
        sim.step()
        if "a" in sim.planner.tracked and sim.planner.tracked["a"].generation == 1:
            postponed = sim.happened["postponed"]
    assert postponed > 0
    assert sim.happened["apart"] > 2
    sim.drain()


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_orders_say_what_tokens_begin(lag: int) -> None:
    """All but sampled tokens that are still on their way, which are among the last ones."""
    sim = simulation(lag, pooling_kind="word", pooling=3, recompact_every=8)
    sim.add("a", PROMPT, 40)
    request, orders = sim.requests["a"], {}
    while sim.scheduler.has_requests() or sim.in_flight:
        sim.step()
        for step in sim.in_flight:
            orders |= {o.generation: o for o in getattr(step.output, ATTRIBUTE).orders}
    if not lag:  # nothing is in flight between the steps
        assert not orders
        return
    assert len(orders) > 2
    tokens = list(request.all_token_ids)
    for order in orders.values():
        expected = token_gaps(tokens[: order.num_tokens]).tolist()
        told = list(order.gaps)
        assert told == expected[: len(told)]
        assert order.num_tokens - len(told) <= lag
        steps = [(1, UNIT, BREAK)[gap] for gap in told] + [1] * (order.num_tokens - len(told))
        sums = [sum(steps[: p + 1]) for p in range(order.num_tokens)]
        assert places(order.gaps, order.num_tokens).tolist() == sums


def test_requests_that_need_words_are_served_without_compression() -> None:
    """By an engine without a tokenizer, where the front end did not know."""
    sim = simulation(1, pooling_kind="ema")
    sim.planner.gaps = None
    sim.add("a", PROMPT, 4, kv_settings='{"pooling_kind": "word"}')
    sim.add("b", PROMPT[::-1], 4)
    compacted = set()
    while sim.scheduler.has_requests() or sim.in_flight:
        sim.step()
        for step in sim.in_flight:
            compacted |= {o.request_id for o in getattr(step.output, ATTRIBUTE).orders}
    assert compacted == {"b"}
    assert sim.planner.counters["refused_invalid_settings"] == 1


@pytest.mark.parametrize(
    "receipts",
    [[], [Receipt("a", 2, 1, 1, 0, 0, 1)], [Receipt("b", 1, 1, 1, 0, 0, 1)]],
    ids=["none", "other-generation", "other-request"],
)
def test_receipts_that_do_not_match_stop_the_engine(receipts: list[Receipt]) -> None:
    sim = simulation()
    sim.add("a", PROMPT, 30)
    plan = getattr(sim.scheduler.schedule(), ATTRIBUTE)
    assert [order.request_id for order in plan.orders] == ["a"]
    with pytest.raises(RuntimeError, match="orders sent and orders run differ"):
        sim.planner.commit(plan, receipts)
    assert not any(block.is_null for block in sim.manager.req_to_blocks["a"])


def test_pruned_prompts_are_no_compactions() -> None:
    sim = simulation()
    sim.add("a", PROMPT, 30)
    plan = getattr(sim.scheduler.schedule(), ATTRIBUTE)
    [order] = plan.orders
    done = Receipt("a", order.generation, 2, 1, 0, 0, 1)
    sim.planner.commit(plan, [PruningReceipt(0.5), done])
    counted = sim.planner.counters
    assert (counted["choose_seconds"], counted["compactions"]) == (0.5, 1)


def test_worker_that_lost_a_compaction_refuses_the_step() -> None:
    sim = simulation()
    sim.add("a", PROMPT, 30)
    sim.step()
    sim.seat.requests.drop("a")
    with pytest.raises(RuntimeError, match="was compacted 1 times, this worker knows of 0"):
        sim.step()


def test_missing_queries_are_an_error() -> None:
    sim = simulation()
    sim.add("a", PROMPT, 30)
    output = sim.scheduler.schedule()
    getattr(output, ATTRIBUTE).record.clear()
    with pytest.raises(RuntimeError, match="no queries were recorded for a"):
        sim.worker.execute_model(output)
