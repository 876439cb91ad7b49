"""Settings side by side on more and more samples, until each is decided.

After every look (a batch of samples) each setting's loss gets bounds. A setting whose lower bound
is above the limit is out; one whose upper bound is below it is in; the others go on. With several
looks at growing data each bound is made at ``alpha / looks`` (Bonferroni), so that the chance that
any look of a setting is wrong on one side stays below ``alpha``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from uncomp.eval.tasks.base import Sample
from uncomp.eval.tune.bounds import Bounds, bounds
from uncomp.eval.tune.measure import FULL, Judge, Score
from uncomp.eval.tune.space import Setting

IN, OUT, UNDECIDED = "within limit", "above limit", "not shown"


@dataclass(frozen=True)
class Rules:
    """When a setting is decided.

    Attributes:
        limit: largest loss allowed, as a share (0.01 is one point).
        alpha: chance of a wrong bound, of all looks of one setting together.
        looks: at the data.
    """

    limit: float
    alpha: float
    looks: int

    @property
    def level(self) -> float:
        """Of one bound at one look."""
        return self.alpha / self.looks

    def checkpoints(self, samples: int) -> list[int]:
        """How many samples there are at each look."""
        return sorted({max(1, round(samples * i / self.looks)) for i in range(1, self.looks + 1)})


@dataclass(frozen=True)
class Outcome:
    """What is known of a setting when its race is over.

    Attributes:
        setting: which.
        verdict: :data:`IN`, :data:`OUT` or :data:`UNDECIDED`.
        loss: with bounds at the level of one look.
        corrected: upper bound that also allows for every other setting of the search; filled in at
            its end.
        full, own: mean scores of the samples asked, with the full cache and with the setting.
        keep: kept over full KV bytes, measured, mean over samples.
        looks: how often it was looked at.
        early: decided before the last sample.
    """

    setting: Setting
    verdict: str
    loss: Bounds
    full: float
    own: float
    keep: float
    looks: int
    early: bool
    corrected: float | None = None


def race(
    judge: Judge,
    settings: Sequence[Setting],
    samples: Sequence[Sample],
    rules: Rules,
    spared: Callable[[int], None] = lambda samples: None,
) -> list[Outcome]:
    """Decide several settings; samples are shared, so that each prompt is computed once.

    Args:
        judge: answers and scores.
        settings: all different.
        samples: in the order in which they are used: any beginning must be like the whole.
        rules: when a setting is decided.
        spared: told of samples that need not be asked, when a setting is decided early.

    Returns:
        One outcome per setting, in their order.
    """
    outcomes: dict[Setting, Outcome] = {}
    start = 0
    running = list(settings)
    for look, end in enumerate(rules.checkpoints(len(samples)), 1):
        judge.ask(samples[start:end], running)
        start = end
        full = judge.scores(samples[:end], FULL)
        for setting in running:
            own = judge.scores(samples[:end], setting.case)
            outcomes[setting] = _outcome(setting, full, own, rules, look, end < len(samples))
        decided = [s for s in running if outcomes[s].verdict != UNDECIDED]
        running = [s for s in running if s not in decided]
        # With the last setting the full cache is done too.
        spared((len(decided) + (not running)) * (len(samples) - end))
        if not running:
            break
    return [outcomes[setting] for setting in settings]


def _outcome(
    setting: Setting,
    full: Sequence[Score],
    own: Sequence[Score],
    rules: Rules,
    look: int,
    early: bool,
) -> Outcome:
    before, after = [s.value for s in full], [s.value for s in own]
    loss = bounds(before, after, rules.level)
    verdict = UNDECIDED
    if loss.lower > rules.limit:
        verdict = OUT
    elif loss.upper < rules.limit:
        verdict = IN
    return Outcome(
        setting,
        verdict,
        loss,
        fmean(before),
        fmean(after),
        fmean(s.keep for s in own),
        look,
        early and verdict != UNDECIDED,
    )


def corrected_upper(
    judge: Judge, outcome: Outcome, samples: Sequence[Sample], rules: Rules, settings: int
) -> float:
    """The upper bound at ``alpha / looks / settings``.

    The smallest of many settings that pass is more likely than any one of them to have passed by
    luck. With this bound the chance that any of ``settings`` is below its truth stays below alpha.
    """
    used = samples[: outcome.loss.n]
    before = [s.value for s in judge.scores(used, FULL)]
    after = [s.value for s in judge.scores(used, outcome.setting.case)]
    return bounds(before, after, rules.level / settings).upper
