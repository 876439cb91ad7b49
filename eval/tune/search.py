"""Which settings to try: Optuna's TPE sampler with the loss limit as a constraint.

What is made small is the keep ratio that the engine measured; feasible is a setting whose upper
bound of the loss is below the limit.
Several settings are asked for at a time (the sampler takes those in flight for bad, "constant
liar"), because settings that are tried together share the prefill of each prompt.

Two things help a small budget. The first settings are the first values of the space at keep ratios
spread over its range. And as soon as something is feasible, one place of every batch is given to
the next smaller keep ratio: with the best setting's other values, or, if that was too small, with
one of them changed.

The search is a function of its seed and of what it measures. It is repeated from its beginning when
a run goes on; the answers on disk make that quick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from uncomp.eval.tasks.base import DataError
from uncomp.eval.tasks.sources import INSTALL
from uncomp.eval.tune.race import IN, Outcome
from uncomp.eval.tune.space import Setting, Space

#: Points the sampler may propose again before it is taken to have run out of ideas.
_REPEATS = 200


@dataclass
class _State:
    study: Any
    space: Space
    tried: dict[Setting, Outcome] = field(default_factory=dict)


def search(
    space: Space,
    try_all: Callable[[Sequence[Setting]], Sequence[Outcome]],
    limit: float,
    trials: int,
    parallel: int,
    seed: int,
) -> list[Outcome]:
    """Try settings.

    Args:
        space: of settings.
        try_all: measures settings together.
        limit: largest loss allowed, as a share.
        trials: different settings to try at most.
        parallel: settings tried together.
        seed: of the sampler.

    Returns:
        What was tried, in order; fewer than ``trials`` where the space is smaller or the sampler
        proposes nothing new.

    Raises:
        ValueError: no trials.
    """
    if trials < 1 or parallel < 1:
        raise ValueError(f"trials={trials}, parallel={parallel}: must be at least 1")
    optuna = need_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
    state = _State(optuna.create_study(sampler=sampler), space)
    _enqueue_first(state, min(parallel, trials))
    size = len(space.all())
    while len(state.tried) < min(trials, size):
        _enqueue_below_best(state)
        asked = _ask(
            state, min(parallel, trials - len(state.tried), size - len(state.tried)), limit
        )
        if not asked:
            break
        for outcome in try_all(list(asked)):
            state.tried[outcome.setting] = outcome
            for trial in asked[outcome.setting]:
                _tell(state.study, trial, outcome, limit)
    return list(state.tried.values())


def need_optuna() -> Any:
    """The sampler's library.

    Raises:
        DataError: it is missing, or older than what says constraints by trial.
    """
    try:
        import optuna
    except ImportError as error:
        raise DataError(f"the search needs optuna ({error}): {INSTALL}") from error
    if not hasattr(optuna.trial.Trial, "set_constraint"):
        raise DataError(f"optuna {optuna.__version__} is too old: pip install 'optuna>=5'")
    return optuna


def best(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The smallest within the limit; of equals the one with the lower upper bound.

    Not one that dropped nothing (prompts shorter than ``min_tokens``): its loss says nothing.
    """
    found = [outcome for outcome in outcomes if outcome.verdict == IN and outcome.keep < 1]
    return min(found, key=lambda o: (o.keep, o.loss.upper), default=None)


def closest(outcomes: Sequence[Outcome]) -> Outcome:
    """Where nothing is within the limit: the one whose upper bound is nearest to it."""
    return min(outcomes, key=lambda o: (o.loss.upper, o.keep))


def pareto(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those that no other beats in both keep ratio and loss, smallest first."""
    front: list[Outcome] = []
    for outcome in sorted(outcomes, key=lambda o: (o.keep, o.loss.mean, o.loss.upper)):
        if not front or outcome.loss.mean < front[-1].loss.mean:
            front.append(outcome)
    return front


def _ask(state: _State, count: int, limit: float) -> dict[Setting, list[Any]]:
    """New settings and the sampler's trials that proposed them."""
    asked: dict[Setting, list[Any]] = {}
    for _ in range(_REPEATS):
        trial = state.study.ask()
        setting = _suggest(state.space, trial)
        if setting in state.tried:
            _tell(state.study, trial, state.tried[setting], limit)
            continue
        asked.setdefault(setting, []).append(trial)
        if len(asked) == count:
            break
    return asked


def _suggest(space: Space, trial: Any) -> Setting:
    return space.setting(
        trial.suggest_categorical("policy", space.policies),
        trial.suggest_categorical("pooling", space.poolings),
        trial.suggest_categorical("window", space.windows),
        trial.suggest_int("step", 0, len(space.keeps) - 1),
    )


def _tell(study: Any, trial: Any, outcome: Outcome, limit: float) -> None:
    trial.set_constraint("loss", outcome.loss.upper - limit)
    study.tell(trial, outcome.keep)


def _enqueue_first(state: _State, count: int) -> None:
    space = state.space
    last = len(space.keeps) - 1
    steps = dict.fromkeys(round(last * (count - i) / count) for i in range(count))
    for step in steps:
        _enqueue(state, space.policies[0], space.poolings[0], space.windows[0], step)


def _enqueue_below_best(state: _State) -> None:
    found = best(list(state.tried.values()))
    if found is None:
        return
    for point in _below(state.space, found.setting):
        if state.space.setting(*point) not in state.tried:
            _enqueue(state, *point)
            return


def _below(space: Space, setting: Setting) -> Iterator[tuple[str, int, int, int]]:
    """One keep ratio below a setting: with its other values, then with one of them changed."""
    step = space.keeps.index(setting.keep) - 1
    if step < 0:
        return
    policy, window = setting.policy, setting.window
    pooling = space.poolings[0] if setting.pooling is None else setting.pooling
    yield policy, pooling, window, step
    yield from ((policy, pooling, other, step) for other in space.windows)
    yield from ((policy, other, window, step) for other in space.poolings)
    yield from ((other, pooling, window, step) for other in space.policies)


def _enqueue(state: _State, policy: str, pooling: int, window: int, step: int) -> None:
    values = {"policy": policy, "pooling": pooling, "window": window, "step": step}
    state.study.enqueue_trial(values)
