"""Policies: which entries of a layer are worth keeping, and how many each head may keep.

A new policy is one file in this folder with a `@register`ed class; every module here is imported
below, so nothing else has to change.
"""

import importlib
import pkgutil

from uncomp.policies.base import LayerView, Policy
from uncomp.policies.registry import get, names, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

NAMES = names()
"""Names of all policies, sorted."""

__all__ = ["NAMES", "LayerView", "Policy", "get", "names", "register"]
