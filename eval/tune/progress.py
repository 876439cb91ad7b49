"""What a search has done and how long the rest may take."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType

from uncomp.eval.tune.race import Outcome


class Progress:
    """A bar with the time left over all answers of a search, and a line per setting.

    Args:
        answers: at most; early decisions make them fewer.
        say: takes the lines.
    """

    def __init__(self, answers: int, say: Callable[[str], None]) -> None:
        from tqdm import tqdm

        self._say, self._settings = say, 0
        self._bar = tqdm(
            total=answers, unit="answer", dynamic_ncols=True, file=sys.stderr, mininterval=2
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def advance(self, answers: int) -> None:
        """So many answers are there now."""
        self._bar.update(answers)

    def spare(self, answers: int) -> None:
        """So many answers will not be asked for."""
        self._bar.total = max(self._bar.n, self._bar.total - answers)
        self._bar.refresh()

    def note(self, outcome: Outcome) -> None:
        """A setting is decided."""
        self._settings += 1
        loss = outcome.loss
        self._bar.clear()
        self._say(
            f"{self._settings}: {outcome.setting.name} keeps {outcome.keep:.3f}, loss "
            f"{100 * loss.mean:.2f} ({100 * loss.lower:.2f} to {100 * loss.upper:.2f}), "
            f"{loss.n} samples: {outcome.verdict}{' (early)' if outcome.early else ''}"
        )
