"""Decode throughput of a batch with the full cache and with a setting, in alternation.

Both answer the same prompts with the same number of tokens (``ignore_eos``). One measurement is two
batches, of ``SHORT`` and of ``SHORT + tokens`` tokens; the tokens of the difference over the time
of the difference is decoding alone: prefill, compaction and start cancel. The order is full,
setting, setting, full, so that a machine that drifts treats both alike. One round that is not
measured comes first: it fills the prefix cache and compiles what is compiled late.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uncomp.eval.engines.base import Ask, Engine, EngineError

#: tokens of the batch that is subtracted
SHORT = 8


class SpeedError(RuntimeError):
    """A throughput that could not be measured; the message says why."""


@dataclass(frozen=True)
class Rate:
    """Tokens/s of the whole batch: median, first and last of the cuts into five parts."""

    median: float
    low: float
    high: float
    repeats: int


@dataclass(frozen=True)
class Comparison:
    """What came out for one setting: both arms of the same alternation."""

    full: Rate
    own: Rate
    batch: int
    tokens: int


def compare(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    full: Mapping[str, Any],
    own: Mapping[str, Any],
    tokens: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Measure one setting against the full cache.

    Args:
        engine: serves both.
        prompts: token ids; the batch.
        full, own: ``extra_args`` of the two.
        tokens: measured per answer.
        rounds: of full, setting, setting, full.
        clock: seconds.

    Raises:
        SpeedError: the long batch was not slower than the short one, or an answer is too short.
        EngineError: the engine failed.
    """
    found: dict[str, list[float]] = {"full": [], "own": []}
    extras = {"full": full, "own": own}
    for turn in range(rounds + 1):
        # Once each before anything counts.
        for place, arm in enumerate(("full", "own", "own", "full") if turn else ("full", "own")):
            label = f"speed:{turn}:{place}:{arm}"
            short = _seconds(engine, f"{label}:short", prompts, extras[arm], SHORT, clock)
            long = _seconds(engine, f"{label}:long", prompts, extras[arm], SHORT + tokens, clock)
            if turn and long <= short:
                raise SpeedError(
                    f"{SHORT + tokens} tokens took {long:.3f} s and {SHORT} took {short:.3f} s: "
                    f"measure more tokens (--speed-tokens)"
                )
            if turn:
                found[arm].append(len(prompts) * tokens / (long - short))
    return Comparison(_rate(found["full"]), _rate(found["own"]), len(prompts), tokens)


def _seconds(
    engine: Engine,
    label: str,
    prompts: Sequence[Sequence[int]],
    extra: Mapping[str, Any],
    tokens: int,
    clock: Callable[[], float],
) -> float:
    # A group each: nothing waits for another's prompt.
    groups = [
        [Ask(f"{label}:{i}", prompt, tokens, extra, ignore_eos=True)]
        for i, prompt in enumerate(prompts)
    ]
    since = clock()
    answers = list(engine.answer(groups))
    seconds = clock() - since
    short = [answer.key for answer in answers if answer.tokens != tokens]
    if short:
        raise EngineError(f"{short[0]}: the answer has not the {tokens} tokens that were asked for")
    return seconds


def _rate(values: Sequence[float]) -> Rate:
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return Rate(statistics.median(values), cuts[0], cuts[-1], len(values))
