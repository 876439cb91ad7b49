"""Second-moment statistics of a head and its covariance."""

from .naive import GramStats, gram, unit_norm_covariance

__all__ = ["GramStats", "gram", "unit_norm_covariance"]
