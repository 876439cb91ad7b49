"""Scores of settings on samples, asked for as they are needed and never twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Protocol

from uncomp.eval.engines.base import Engine, EngineError
from uncomp.eval.methods import Method
from uncomp.eval.run.predict import Key, key, predict
from uncomp.eval.run.records import Case, Prediction
from uncomp.eval.run.score import values
from uncomp.eval.tasks.base import Sample
from uncomp.eval.tune.data import OPEN
from uncomp.eval.tune.ledger import Ledger
from uncomp.eval.tune.space import Setting

FULL = Case("full")
#: what stands for the score of a text that the model is made to say
AGREEMENT = "top1_agreement"
_FORCED = "likelihood"

Start = Callable[[], Engine]


class Judge(Protocol):
    """What a race needs."""

    def ask(self, samples: Sequence[Sample], settings: Sequence[Setting]) -> None:
        """Have these samples answered with the full cache and under these settings."""

    def scores(self, samples: Sequence[Sample], case: Case) -> list[Score]:
        """The scores of samples that have been asked."""


@dataclass(frozen=True)
class Score:
    """One sample under one case, the mean over its turns.

    Attributes:
        value: in [0, 1].
        keep: kept over full KV bytes as the engine measured them.
    """

    value: float
    keep: float


class EngineJudge:
    """Asks an engine.

    Args:
        ledger: where answers are kept.
        methods: full and those of the space.
        start: gives the engine; only called if something is not answered yet.
        advance: told of answers, how many at a time.
    """

    def __init__(
        self,
        ledger: Ledger,
        methods: Sequence[Method],
        start: Start,
        advance: Callable[[int], None],
    ) -> None:
        self._ledger, self._methods, self._start = ledger, methods, start
        self._advance = advance
        self._by_key: dict[Key, Prediction] = {}
        self._scores: dict[tuple[str, str, Case], Score] = {}
        self._taken = 0

    def ask(self, samples: Sequence[Sample], settings: Sequence[Setting]) -> None:
        """Raises:
        EngineError: the engine failed; what was answered is on disk.
        """
        wanted = [FULL, *(setting.case for setting in settings)]
        self._take()
        left = [sample for sample in samples if any(self._open(sample, case) for case in wanted)]
        turns = sum(len(sample.turns) for sample in samples) * len(wanted)
        missing = sum(self._open(sample, case) for sample in left for case in wanted)
        self._advance(turns - missing)
        if not left:
            return
        seen = 0

        def advance(there: int, total: int) -> None:
            nonlocal seen
            # The first call says how many of them are there from before; those are counted.
            now = there - (total - missing)
            self._advance(now - seen)
            seen = now

        predict(self._ledger, left, self._methods, self._start(), advance, wanted)
        self._take()

    def scores(self, samples: Sequence[Sample], case: Case) -> list[Score]:
        return [self._score(sample, case) for sample in samples]

    def full_mean(self, samples: Sequence[Sample]) -> float:
        """Mean score with the full cache."""
        return fmean(score.value for score in self.scores(samples, FULL))

    def _take(self) -> None:
        """Predictions that were added since the last time."""
        for prediction in self._ledger.made[self._taken :]:
            self._by_key[_key(prediction)] = prediction
        self._taken = len(self._ledger.made)

    def _open(self, sample: Sample, case: Case) -> int:
        """Turns without an answer."""
        return sum(
            key(sample.task, sample.id, turn, case) not in self._by_key
            for turn in range(len(sample.turns))
        )

    def _score(self, sample: Sample, case: Case) -> Score:
        name = (sample.task, sample.id, case)
        if name not in self._scores:
            self._scores[name] = self._scored(sample, case)
        return self._scores[name]

    def _scored(self, sample: Sample, case: Case) -> Score:
        found, keeps = [], []
        for turn in range(len(sample.turns)):
            prediction = self._by_key[key(sample.task, sample.id, turn, case)]
            for scored in values(prediction, sample, self._by_key):
                if prediction.logprobs is None or scored.metric == AGREEMENT:
                    found.append(scored.value)
                    keeps.append(scored.keep_measured)
        measured = [keep for keep in keeps if keep is not None]
        if len(measured) < len(keeps):
            raise EngineError(
                f"{sample.task} {sample.id}: the engine does not say what it kept, so there is "
                f"nothing to make small; is uncomp active there?"
            )
        return Score(fmean(found), fmean(measured))


def _key(prediction: Prediction) -> Key:
    return key(prediction.task, prediction.sample, prediction.turn, prediction.case)


def with_own_answers(
    ledger: Ledger, samples: Sequence[Sample], full: Method, start: Start
) -> tuple[list[Sample], int]:
    """Samples without references, to be judged against the full cache's own answers.

    The model answers with its full cache; the text of that answer is then forced under every case
    (:mod:`uncomp.eval.engines.forced`), and positions count at which the most probable token is the
    full cache's.

    Args:
        ledger: of these answers; a folder of its own.
        samples: those without references have metric :data:`uncomp.eval.tune.data.OPEN`.
        full: the full cache.
        start: gives the engine, if something is not answered yet.

    Returns:
        The samples in their order, and how many were left out because the answer was empty.

    Raises:
        EngineError: the engine failed.
    """
    unanswered = [sample for sample in samples if sample.metric == OPEN]
    done = {prediction.sample for prediction in ledger.made}
    left = [sample for sample in unanswered if sample.id not in done]
    if left:
        predict(ledger, left, [full], start(), lambda there, total: None, [FULL])
    said = {prediction.sample: prediction.text for prediction in ledger.made}
    ready: list[Sample] = []
    for sample in samples:
        if sample.metric != OPEN:
            ready.append(sample)
        elif said[sample.id].strip():
            turn = replace(sample.turns[0], forced=said[sample.id])
            ready.append(replace(sample, metric=_FORCED, turns=(turn,)))
    return ready, len(samples) - len(ready)
