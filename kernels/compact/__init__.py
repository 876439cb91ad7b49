"""Moving the entries that stay into the sub-blocks dealt to their heads."""

from .naive import compact, record

__all__ = ["compact", "record"]
