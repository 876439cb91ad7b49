"""Which prompt tokens go on from layer to layer while a prompt is read (UNComp's second half)."""

from uncomp.pruning.choice import CHOICES, WIDEST, Choice, choose_tokens
from uncomp.pruning.schedule import Schedule, always_read, parse_layers

__all__ = [
    "CHOICES",
    "WIDEST",
    "Choice",
    "Schedule",
    "always_read",
    "choose_tokens",
    "parse_layers",
]
