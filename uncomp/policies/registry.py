"""Policies by name."""

from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from uncomp.policies.base import Policy

_POLICIES: dict[str, type[Policy]] = {}

P = TypeVar("P", bound=type[Policy])


def register(policy: P) -> P:
    """Class decorator: makes a policy (a dataclass of its settings) available under its name.

    Raises:
        TypeError: not a dataclass.
        ValueError: the name is taken by another class.
    """
    if not is_dataclass(policy):
        raise TypeError(f"{policy.__qualname__} must be a dataclass: its fields are its settings")
    known = _POLICIES.get(policy.name)
    if known is not None and known.__qualname__ != policy.__qualname__:
        raise ValueError(f"policy {policy.name!r} is already registered by {known.__qualname__}")
    _POLICIES[policy.name] = policy
    return policy


def names() -> tuple[str, ...]:
    """Registered names, sorted."""
    return tuple(sorted(_POLICIES))


def get(name: str, **settings: Any) -> Policy:
    """A new policy with these settings; defaults for those not given.

    Raises:
        ValueError: unknown name (all names are listed), unknown setting (the policy's settings are
            listed), or a value the policy rejects.
    """
    if name not in _POLICIES:
        raise ValueError(f"unknown policy {name!r}; allowed: {', '.join(names())}")
    policy = _POLICIES[name]
    allowed = [field.name for field in fields(policy)]  # type: ignore[arg-type]
    unknown = sorted(set(settings) - set(allowed))
    if unknown:
        raise ValueError(
            f"policy {name!r} has no setting {', '.join(map(repr, unknown))}; "
            f"allowed: {', '.join(allowed) or 'none'}"
        )
    return policy(**settings)
