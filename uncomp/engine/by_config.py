"""One compactor for the server's settings, others for requests with a policy of their own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from uncomp.config import UncompConfig

C = TypeVar("C")


class ByConfig(Generic[C]):
    """Makes a compactor when its settings are first seen.

    Args:
        default: compactor of the server's settings.
        make: makes one for other settings, on the same caches and requests.
        most: compactors of others that are remembered; they are small, but requests choose them.
    """

    def __init__(self, default: C, make: Callable[[UncompConfig], C], most: int = 64) -> None:
        self.default, self._make, self._most = default, make, most
        self._others: OrderedDict[UncompConfig, C] = OrderedDict()

    def of(self, config: UncompConfig | None) -> C:
        """The compactor for an order's own settings (``None``: the server's)."""
        if config is None:
            return self.default
        found = self._others.pop(config, None)
        if found is None:
            found = self._make(config)
        self._others[config] = found
        if len(self._others) > self._most:
            self._others.popitem(last=False)
        return found
