"""From what an engine says about forced tokens to nll, KL and agreement with the full cache.

The model is made to say a given text twice, once with its full cache and once with a compressed
one, and the distributions over the next token are compared at every position. That measures what
the compression changed, whether or not the model was right in the first place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: Digits after the point of a stored log-probability. Rounding moves each by at most 5e-6, so
#: ``nll`` by at most that and a rest mass by at most that, far below what bfloat16 logits (8 bits,
#: steps of 0.06 to 0.12 at logits of 16 to 32) are off anyway, for half the size of all digits.
DIGITS = 5
#: Probability masses below this are noise of that rounding: the least a rest bucket is divided by.
EPSILON = 10.0**-DIGITS


@dataclass(frozen=True)
class TokenRecord:
    """What the engine says about one forced token, before that token is fed to it.

    Attributes:
        forced: log-probability of the forced token, natural logarithm, of the raw distribution
            (temperature 1, no penalties, the whole vocabulary).
        top_ids: the k most probable tokens, in any order.
        top_logprobs: their log-probabilities.

    Raises:
        ValueError: for lists that are empty, differ in length or repeat a token, and for a number
            that is no log-probability (NaN, infinite, above rounding of 0).
    """

    forced: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.top_ids or len(self.top_ids) != len(self.top_logprobs):
            raise ValueError(
                f"a token record needs as many top tokens as log-probabilities, at least one, got "
                f"{len(self.top_ids)} and {len(self.top_logprobs)}"
            )
        if len(set(self.top_ids)) != len(self.top_ids):
            raise ValueError(f"the top tokens of a record must differ, got {self.top_ids}")
        for value in (self.forced, *self.top_logprobs):
            if not (math.isfinite(value) and value <= 1e-3):
                raise ValueError(
                    f"{value} is no log-probability (finite, at most 0): did the engine return NaN?"
                )


def to_json(records: Sequence[TokenRecord]) -> list[Any]:
    """Records as lists ``[forced, ids, logprobs]``, rounded to :data:`DIGITS` digits."""
    return [
        [round(r.forced, DIGITS), list(r.top_ids), [round(v, DIGITS) for v in r.top_logprobs]]
        for r in records
    ]


def from_json(value: Any) -> tuple[TokenRecord, ...]:
    """Records from what :func:`to_json` made.

    Raises:
        ValueError: if it is something else.
    """
    try:
        return tuple(
            TokenRecord(float(forced), tuple(map(int, ids)), tuple(map(float, logprobs)))
            for forced, ids, logprobs in value
        )
    except TypeError as error:
        raise ValueError(
            f"expected a list of [forced, ids, logprobs] per token, got {str(value)[:80]!r}"
        ) from error


def nll(records: Sequence[TokenRecord], skip: int = 0) -> float:
    """Negative log-likelihood of the forced tokens, in nats per token.

    Args:
        records: one per forced token.
        skip: tokens at the start that are not scored.

    Raises:
        ValueError: if no token is left to score.
    """
    return -_mean([r.forced for r in _scored(records, skip)])


def top1_agreement(
    full: Sequence[TokenRecord], compressed: Sequence[TokenRecord], skip: int = 0
) -> float:
    """Share of positions, in [0, 1], at which both caches make the same token the most probable.

    Low-precision logits often tie at the top, and which of the tied tokens an engine lists first
    is arbitrary. Positions agree if any of the most probable tokens is the same.

    Args and errors as in :func:`kl`.
    """
    return _mean([float(bool(_best(p) & _best(q))) for p, q in _pairs(full, compressed, skip)])


def kl(full: Sequence[TokenRecord], compressed: Sequence[TokenRecord], skip: int = 0) -> float:
    """A lower bound of KL(full || compressed), in nats per token.

    Only the most probable tokens of each distribution are known. Tokens in both lists count one by
    one, all others as one bucket with the rest of the mass. Merging outcomes never increases a KL
    divergence (data-processing inequality; Cover and Thomas, Elements of Information Theory, 2nd
    edition, section 2.7, log sum inequality), so the result is at most the true divergence; it
    is the true one if the lists are the whole vocabulary. Lists with no common token give 0: the
    bound says nothing then, while ``nll`` and :func:`top1_agreement` do. Records that went through
    :func:`to_json` give the bound up to their rounding.

    Args:
        full: with the full cache, one record per forced token.
        compressed: the same tokens with the compressed cache.
        skip: tokens at the start that are not scored.

    Raises:
        ValueError: if the lengths differ or no token is left to score.
    """
    return _mean([_token_kl(p, q) for p, q in _pairs(full, compressed, skip)])


def scored_values(
    full: Sequence[TokenRecord], compressed: Sequence[TokenRecord], skip: int = 0
) -> dict[str, float]:
    """All numbers of one forced text: ``nll``, ``nll_increase``, ``kl`` and ``top1_agreement``.

    ``nll`` is the compressed cache's, ``nll_increase`` what it has more than the full one; it is
    negative where dropping tokens happened to help. Args and errors as in :func:`kl`.
    """
    return {
        "nll": nll(compressed, skip),
        "nll_increase": nll(compressed, skip) - nll(full, skip),
        "kl": kl(full, compressed, skip),
        "top1_agreement": top1_agreement(full, compressed, skip),
    }


def _token_kl(full: TokenRecord, compressed: TokenRecord) -> float:
    """The bound at one position."""
    known = dict(zip(compressed.top_ids, compressed.top_logprobs, strict=True))
    common = [
        (log_p, known[token])
        for token, log_p in zip(full.top_ids, full.top_logprobs, strict=True)
        if token in known
    ]
    total = math.fsum(math.exp(log_p) * (log_p - log_q) for log_p, log_q in common)
    rest_p = 1 - math.fsum(math.exp(log_p) for log_p, _ in common)
    rest_q = 1 - math.fsum(math.exp(log_q) for _, log_q in common)
    if rest_p > 0:
        # A rest that is all but 0 is rounding noise, and dividing by it would invent divergence.
        # Raising it lowers the result, so the bound stays one.
        rest_q = max(rest_q, EPSILON)
        total += rest_p * math.log(rest_p / rest_q)
    # Masses that are rounded or raised need not add up to 1, so that a 0 can come out as -1e-6.
    return max(total, 0.0)


def _best(record: TokenRecord) -> set[int]:
    """The most probable token, or all that tie."""
    top = max(record.top_logprobs)
    return {t for t, v in zip(record.top_ids, record.top_logprobs, strict=True) if v == top}


def _pairs(
    full: Sequence[TokenRecord], compressed: Sequence[TokenRecord], skip: int
) -> list[tuple[TokenRecord, TokenRecord]]:
    if len(full) != len(compressed):
        raise ValueError(
            f"{len(full)} tokens were forced with the full cache and {len(compressed)} with the "
            "compressed one: compare the same text, tokenized in the same way"
        )
    return list(zip(_scored(full, skip), _scored(compressed, skip), strict=True))


def _scored(records: Sequence[TokenRecord], skip: int) -> Sequence[TokenRecord]:
    if not 0 <= skip < len(records):
        raise ValueError(
            f"cannot skip {skip} of {len(records)} forced tokens: at least one must be scored"
        )
    return records[skip:]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
