"""The ledger: every patch, and what applies them."""

from __future__ import annotations

from uncomp.patches import (
    early_validation,
    engine_config,
    metrics_endpoint,
    request_validation,
)
from uncomp.patches.patch import Patch, PatchError

PATCHES: tuple[Patch, ...] = (
    engine_config.PATCH,
    request_validation.PATCH,
    early_validation.PATCH,
    metrics_endpoint.PATCH,
)

__all__ = ["PATCHES", "PatchError", "apply_all", "apply_entry"]


def apply_entry() -> None:
    """Install the patch that notices whether compression is asked for; the others wait for that.

    Raises:
        PatchError: it does not fit; the message names the symbol.
    """
    engine_config.PATCH.apply()


def apply_all() -> None:
    """Install every patch (a running engine asked for compression).

    Raises:
        PatchError: one does not fit; nothing is installed then.
    """
    for patch in PATCHES:
        patch.check()
    for patch in PATCHES:
        patch.apply()
