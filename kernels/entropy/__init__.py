"""Spectrum and truncated matrix entropy of covariance matrices."""

from .naive import MEASURES, Measure, default_truncation, spectrum, truncated_entropy

__all__ = ["MEASURES", "Measure", "default_truncation", "spectrum", "truncated_entropy"]
