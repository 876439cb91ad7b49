"""Attention of a few new tokens per row over sub-blocks, compressed or not."""

from .launch import DecodeWorkspace, decode, plan, programs
from .naive import decode_reference

__all__ = ["DecodeWorkspace", "decode", "decode_reference", "plan", "programs"]
