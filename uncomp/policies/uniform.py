"""Attention of the last queries, equal budgets (SnapKV, arXiv 2404.14469)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from uncomp.kernels.window_scores import Over, Reduce, window_scores
from uncomp.policies.base import LayerView, Policy
from uncomp.policies.registry import register


@register
@dataclass(frozen=True)
class Uniform(Policy):
    """Keeps what the last queries attend to; every head gets the same budget.

    Attributes:
        reduce: "sum" or "max" over the query heads of a KV head.
        over: "sum" or "max" over the queries of the window, before that.
    """

    name: ClassVar[str] = "uniform"
    needs_queries: ClassVar[bool] = True
    pool_scores: ClassVar[bool] = True

    reduce: Reduce = "sum"
    over: Over = "max"

    def __post_init__(self) -> None:
        for name in ("reduce", "over"):
            value = getattr(self, name)
            if value not in ("sum", "max"):
                raise ValueError(f"{name} must be 'sum' or 'max', got {value!r}")

    def score(self, view: LayerView) -> Tensor:
        """Attention mass of the window; see `Policy.score` and `window_scores`."""
        if view.queries is None or view.query_positions is None:
            raise ValueError(f"policy {self.name!r} needs the queries of layer {view.layer}")
        return window_scores(
            view.queries,
            view.keys,
            view.lengths,
            view.positions,
            view.query_positions,
            view.scale,
            view.softcap,
            self.reduce,
            over=self.over,
        )
