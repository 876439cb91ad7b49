"""Numbers as they are printed: scores times 100, nats as they are, always with n and interval."""

from __future__ import annotations

from uncomp.eval.report.blocks import Cell
from uncomp.eval.report.stats import Difference, Estimate, Interval

MINUS = "\N{MINUS SIGN}"
NONE = Cell("\N{EM DASH}")


def number(value: float, higher: bool) -> str:
    """A score in [0, 1] as 0 to 100 with one decimal; anything else with three digits."""
    return _minus(f"{100 * value:.1f}" if higher else f"{value:#.3g}".rstrip("."))


def signed(value: float, higher: bool) -> str:
    """The same with its sign."""
    text = number(value, higher)
    return text if value < 0 or float(text.replace(MINUS, "-")) == 0 else f"+{text}"


def bounds(interval: Interval, higher: bool) -> str:
    """``[low, high]``, or why there is none."""
    if interval.low is None or interval.high is None:
        return f"no interval: {interval.how}"
    if interval.how == "all equal":
        return "no interval: all equal"
    text = f"[{number(interval.low, higher)}, {number(interval.high, higher)}]"
    return text if interval.how == "BCa" else f"{text} {interval.how}"


def p_value(p: float) -> str:
    """``p = 0.03`` or ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def mean_cell(estimate: Estimate, higher: bool, mark: str = "") -> Cell:
    """Mean with interval, samples and, if there are more, answers."""
    count = f"n = {estimate.n}"
    if estimate.turns != estimate.n:
        count += f" ({estimate.turns} answers)"
    return Cell(number(estimate.mean, higher), (bounds(estimate.interval, higher), count), mark)


def difference_cell(difference: Difference | None, higher: bool) -> Cell:
    """Difference with interval, p, n and what had no partner."""
    if difference is None:
        return NONE
    ends = difference.interval
    count = f"{p_value(difference.p_sign)}, n = {difference.n}"
    small = [bounds(ends, higher), count]
    lonely = difference.only_case + difference.only_reference
    if lonely:
        small.append(f"{lonely} answers unpaired")
    mark = ""
    if ends.how != "all equal" and ends.low is not None and ends.high is not None:
        if ends.low > 0:
            mark = "up" if higher else "down"
        elif ends.high < 0:
            mark = "down" if higher else "up"
    return Cell(signed(difference.difference, higher), tuple(small), mark)


def share(value: float | None) -> str:
    """A keep ratio in percent."""
    return NONE.text if value is None else f"{100 * value:.3g} %"


def tokens(value: float) -> str:
    """A signed count of tokens, one decimal."""
    text = _minus(f"{value:.1f}")
    return text if value < 0 or text == "0.0" else f"+{text}"


def _minus(text: str) -> str:
    if not text.startswith("-"):
        return text
    return text[1:] if float(text) == 0 else MINUS + text[1:]
