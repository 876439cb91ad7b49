"""Which prompt tokens go on from layer to layer while a prompt is read (UNComp's second half)."""

from uncomp.pruning.choice import CHOICES, WIDEST, Choice, choose_tokens
from uncomp.pruning.schedule import Schedule, parse_layers

__all__ = ["CHOICES", "WIDEST", "Choice", "Schedule", "choose_tokens", "parse_layers"]
