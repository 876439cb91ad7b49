"""What is searched: policies, pooling widths, windows and keep ratios."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from uncomp import policies
from uncomp.config import PRESETS, UncompConfig
from uncomp.eval.run.records import Case


class SpaceError(ValueError):
    """A space that cannot be searched; the message says why and what is allowed."""


@dataclass(frozen=True)
class Setting:
    """One point of the space.

    Attributes:
        policy, window, keep: as in :class:`uncomp.config.UncompConfig`.
        pooling: None for a policy that does not pool its scores.
    """

    policy: str
    pooling: int | None
    window: int
    keep: float

    @property
    def method(self) -> str:
        """Name of everything but the keep ratio, e.g. ``adakv-p15-w8``."""
        pooling = "" if self.pooling is None else f"-p{self.pooling}"
        return f"{self.policy}{pooling}-w{self.window}"

    @property
    def name(self) -> str:
        return f"{self.method}-k{self.keep:g}"

    @property
    def case(self) -> Case:
        return Case(self.method, self.keep)

    def settings(self) -> dict[str, Any]:
        """Of :class:`uncomp.config.UncompConfig`, without the keep ratio."""
        given = {"policy": self.policy, "pooling": self.pooling, "window": self.window}
        return {name: value for name, value in given.items() if value is not None}

    def config(self) -> UncompConfig:
        """As a server would have it."""
        return UncompConfig.from_mapping({**self.settings(), "keep": self.keep})


@dataclass(frozen=True)
class Space:
    """The values of every setting. The first ones are those tried first.

    Raises:
        SpaceError: an empty or unknown value, or a preset (its settings are fixed).
    """

    policies: tuple[str, ...] = ("adakv", "uniform", "entropy")
    poolings: tuple[int, ...] = (4, 2, 8)
    windows: tuple[int, ...] = (32, 8)
    keeps: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("policies", "poolings", "windows", "keeps"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise SpaceError(f"{name}={values}: give at least one value, each once")
        known = policies.names()
        for policy in self.policies:
            if policy in PRESETS:
                raise SpaceError(
                    f"policy {policy!r} is a preset, there is nothing to tune: compare it with "
                    f"`uncomp eval`"
                )
            if policy not in known:
                raise SpaceError(f"unknown policy {policy!r}; there are: {', '.join(known)}")
        try:
            for setting in self.all():
                setting.config()
        except ValueError as error:
            raise SpaceError(str(error)) from error

    def setting(self, policy: str, pooling: int, window: int, step: int) -> Setting:
        """The point with these values; pooling is left out where the policy has no use for it."""
        pools = policies.get(policy).pool_scores
        return Setting(policy, pooling if pools else None, window, self.keeps[step])

    def all(self) -> list[Setting]:
        """Every point, each once."""
        points = itertools.product(
            self.policies, self.poolings, self.windows, range(len(self.keeps))
        )
        return list(dict.fromkeys(self.setting(*point) for point in points))

    def methods(self) -> dict[str, dict[str, Any]]:
        """Name to settings, for :func:`uncomp.eval.methods.find`."""
        return {setting.method: setting.settings() for setting in self.all()}


def keep_grid(low: float, high: float, steps: int) -> tuple[float, ...]:
    """Keep ratios at equal factors from ``low`` to ``high``, four digits, ascending.

    Raises:
        SpaceError: not ``0 < low < high <= 1``, or fewer than two steps.
    """
    if not 0 < low < high <= 1:
        raise SpaceError(f"keep ratios from {low} to {high}: must be 0 < low < high <= 1")
    if steps < 2:
        raise SpaceError(f"{steps} keep ratios: at least 2 are needed")
    factor = (high / low) ** (1 / (steps - 1))
    return unique([float(f"{low * factor**i:.4g}") for i in range(steps)])


def unique(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(sorted(set(values)))
