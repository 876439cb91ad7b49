"""One change to vLLM, as data that tests and the start-up check can read."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_MARK = "__uncomp_patch__"


class PatchError(RuntimeError):
    """A patch does not fit the installed vLLM."""


@dataclass(frozen=True)
class Patch:
    """Replaces one function of vLLM by a wrapper around it.

    Attributes:
        name: short and unique.
        module, symbol: what is wrapped, e.g. "vllm.engine.arg_utils" and
            "EngineArgs.create_engine_config".
        parameters: names that its signature must have, in this order, for the wrapper to be right.
        why: the need, and why no hook of vLLM's serves it.
        upstream: link, or the reason there is none.
        remove_when: what has to happen for this file to be deleted.
        wrap: original function -> replacement.
    """

    name: str
    module: str
    symbol: str
    parameters: tuple[str, ...]
    why: str
    upstream: str
    remove_when: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]

    @property
    def target(self) -> str:
        return f"{self.module}.{self.symbol}"

    def check(self) -> Callable[..., Any]:
        """The function to wrap, unwrapped.

        Raises:
            PatchError: naming the symbol, if it is gone or has another signature.
        """
        owner, attribute = self._locate()
        function = getattr(owner, attribute)
        original = getattr(function, _MARK, function)
        have = list(inspect.signature(original).parameters)
        wanted = [name for name in have if name in self.parameters]
        if wanted != list(self.parameters):
            raise PatchError(
                f"patch {self.name!r} does not fit: {self.target} has parameters {have}, needs "
                f"{list(self.parameters)}. Install a supported vLLM, or set UNCOMP_DISABLE=1"
            )
        return original

    def apply(self) -> None:
        """Install the wrapper; a second call does nothing."""
        original = self.check()
        owner, attribute = self._locate()
        if self.applied():
            return
        replacement = functools.wraps(original)(self.wrap(original))
        setattr(replacement, _MARK, original)
        self._set(owner, attribute, replacement)

    def applied(self) -> bool:
        owner, attribute = self._locate()
        return hasattr(getattr(owner, attribute), _MARK)

    def revert(self) -> None:
        """Put vLLM's own function back (tests)."""
        owner, attribute = self._locate()
        self._set(owner, attribute, self.check())

    @staticmethod
    def _set(owner: Any, attribute: str, function: Callable[..., Any]) -> None:
        static = isinstance(inspect.getattr_static(owner, attribute), staticmethod)
        setattr(owner, attribute, staticmethod(function) if static else function)

    def _locate(self) -> tuple[Any, str]:
        try:
            owner: Any = importlib.import_module(self.module)
            *path, attribute = self.symbol.split(".")
            for part in path:
                owner = getattr(owner, part)
            getattr(owner, attribute)
        except (ImportError, AttributeError) as error:
            raise PatchError(
                f"patch {self.name!r} does not fit: {self.target} does not exist ({error}). "
                f"Install a supported vLLM, or set UNCOMP_DISABLE=1"
            ) from error
        return owner, attribute
