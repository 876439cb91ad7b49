"""Random traffic under both schedulers, with outputs delivered at once, one and two steps late.

The checks are in the harness: after every scheduler call the block accounting is consistent, and in
every step every row reads exactly the content it should (:mod:`simulate`, :mod:`fake_runner`).
"""

import random
from collections import Counter
from typing import Any

import pytest
from fake_runner import Shape
from sim_traffic import Traffic
from simulate import Setup, Simulation

SETTINGS: dict[str, dict[str, Any]] = {
    "keep": {"keep": 0.4, "window": 2, "sinks": 1, "recompact_every": 4},
    "keep-once": {"keep": 0.6, "window": 3, "sinks": 0, "recompact_every": 0},
    "budget": {"budget": 10, "policy": "random", "window": 2, "sinks": 2, "recompact_every": 8},
    "every-block": {"budget": 8, "window": 2, "sinks": 1, "min_tokens": 1, "recompact_every": 1},
    "relocate": {"keep": 1.0, "relocate": True, "window": 2, "recompact_every": 4},
    "relocate-again": {"keep": 0.5, "relocate": True, "window": 2, "recompact_every": 1},
}
ENGINES = {
    "sync": (False, 0),
    "async-prompt": (True, 0),
    "async-one-late": (True, 1),
    "async-two-late": (True, 2),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("asynchronous", "lag"), ENGINES.values(), ids=ENGINES)
def test_random_traffic(name: str, asynchronous: bool, lag: int) -> None:
    happened = sum((_run(SETTINGS[name], asynchronous, lag, seed) for seed in (1, 2)), Counter())
    needed = {"ordered", "exchanged", "hits", "aborted"}
    if not SETTINGS[name].get("relocate"):
        needed |= {"freed", "reused"}
    if name != "every-block":  # it needs so little memory that nothing is ever preempted
        needed |= {"preempted", "resumed"}
    assert needed <= set(happened), "the traffic does not test what it should"


@pytest.mark.parametrize(("asynchronous", "lag"), ENGINES.values(), ids=ENGINES)
def test_random_traffic_without_prefix_caching(asynchronous: bool, lag: int) -> None:
    happened = _run(SETTINGS["keep"], asynchronous, lag, seed=3, prefix_caching=False)
    assert {"ordered", "freed", "reused", "preempted"} <= set(happened)
    assert not happened["hits"]
    assert not happened["exchanged"]


@pytest.mark.parametrize(("asynchronous", "lag"), ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("seed", range(3))
def test_random_traffic_with_later_compactions_apart(
    asynchronous: bool, lag: int, seed: int
) -> None:
    settings = SETTINGS["keep"] | {"recompact_every": 8}
    happened = _run(settings, asynchronous, lag, seed=seed, apart=True)
    assert {"apart", "freed", "reused", "preempted"} <= set(happened)


def _run(
    settings: dict[str, Any], asynchronous: bool, lag: int, seed: int, **more: Any
) -> Counter[str]:
    rng = random.Random(seed)
    size = rng.choice([2, 4, 8])
    longest = 96
    setup = Setup(
        settings={"policy": "uniform", "min_tokens": 8, "pooling": 1} | settings,
        asynchronous=asynchronous,
        lag=lag,
        # Room for one to two of the longest requests: preemption is frequent.
        shape=Shape(rng.randint(longest // size + 3, 2 * longest // size), size),
        max_model_len=longest,
        max_num_batched_tokens=rng.choice([8, 16, 40]),
        wide_rows=not asynchronous,  # CPU engines are neither asynchronous nor narrow
        seed=seed,
        **more,
    )
    simulation = Simulation(setup)
    Traffic(simulation, random.Random(seed)).run(steps=150)
    return simulation.happened
