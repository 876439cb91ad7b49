"""Could a prompt say how much of it may be dropped?

`python -m uncomp.eval.ablation.per_prompt rows.jsonl` reads rows of `uncomp.eval.ablation` with
several keep ratios and asks two questions about one variant:

1. At one ratio, are the prompts that lose most those that what is known when they are compressed
   points to? (rank correlation over samples)
2. If each prompt kept the fewest bytes at which that stays below a limit, would it lose less than
   prompts that all keep the same share, at the same bytes in the mean?
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

#: what a row knows before the answer, see `measure.signs`; higher should mean that more is lost
SIGNS = ("missed", "missed_worst", "entropy")
_RESAMPLES = 2000

Row = Mapping[str, Any]


def correlations(rows: Iterable[Row], variant: str) -> list[dict[str, Any]]:
    """Spearman's rank correlation of every sign with the KL divergence, by keep ratio.

    Returns:
        Lines with ``sign``, ``keep``, ``samples``, ``correlation`` and a 95 % bootstrap interval.
    """
    from scipy.stats import spearmanr

    lines = []
    for keep, same in sorted(_by_keep(rows, variant).items(), reverse=True):
        lost = np.array([row["kl"] for row in same])
        for sign in SIGNS:
            seen = np.array([row[sign] for row in same])
            drawn = []
            for pick in _draws(len(same)):
                if len(set(lost[pick])) > 1 and len(set(seen[pick])) > 1:
                    drawn.append(spearmanr(seen[pick], lost[pick]).statistic)
            low, high = np.quantile(drawn, [0.025, 0.975])
            found = spearmanr(seen, lost).statistic
            lines.append(
                {
                    "sign": sign,
                    "keep": keep,
                    "samples": len(same),
                    "correlation": round(float(found), 3),
                    "low": round(float(low), 3),
                    "high": round(float(high), 3),
                }
            )
    return lines


def adaptive(rows: Iterable[Row], variant: str, sign: str, limits: int = 7) -> list[dict[str, Any]]:
    """Prompts that keep as much as a sign asks for, against equal shares at equal bytes.

    Equal shares between two ratios are read off the straight line between them, which is what
    prompts that are dealt one of the two by chance would lose.

    Args:
        limits: how many, spread over what the sign was.

    Returns:
        Lines with ``kept`` (mean share of the bytes), ``kl`` and ``kl_equal``, their difference and
        its 95 % bootstrap interval over samples (below 0: the sign helps).
    """
    by_keep = _by_keep(rows, variant)
    keeps = sorted(by_keep)
    samples = sorted(set.intersection(*(set(map(_name, same)) for same in by_keep.values())))
    table = {(row["keep"], _name(row)): row for same in by_keep.values() for row in same}
    kl = np.array([[table[keep, s]["kl"] for s in samples] for keep in keeps])
    seen = np.array([[table[keep, s][sign] for s in samples] for keep in keeps])
    # Keeping more never looks worse: a sign that says so is noise.
    seen = np.minimum.accumulate(seen, axis=0)
    lines = []
    for limit in np.quantile(seen, np.linspace(0.1, 0.9, limits)):
        ok = seen <= limit
        chosen = np.where(ok.any(0), ok.argmax(0), len(keeps) - 1)
        kept = np.array(keeps)[chosen]
        lost = kl[chosen, np.arange(len(samples))]

        def gain(pick: Any, kept: Any = kept, lost: Any = lost) -> float:
            equal = np.interp(kept[pick].mean(), keeps, kl[:, pick].mean(1))
            return float(lost[pick].mean() - equal)

        everything = np.arange(len(samples))
        low, high = np.quantile([gain(pick) for pick in _draws(len(samples))], [0.025, 0.975])
        lines.append(
            {
                "sign": sign,
                "limit": round(float(limit), 4),
                "samples": len(samples),
                "kept": round(float(kept.mean()), 4),
                "kl": round(float(lost.mean()), 4),
                "kl_equal": round(float(lost.mean()) - gain(everything), 4),
                "difference": round(gain(everything), 4),
                "low": round(float(low), 4),
                "high": round(float(high), 4),
            }
        )
    return lines


def _draws(count: int) -> Iterable[Any]:
    rng = np.random.default_rng(0)
    return (rng.integers(0, count, count) for _ in range(_RESAMPLES))


def _name(row: Row) -> tuple[str, str]:
    return row["task"], row["sample"]


def _by_keep(rows: Iterable[Row], variant: str) -> dict[float, list[Row]]:
    found: dict[float, dict[tuple[str, str], Row]] = defaultdict(dict)
    for row in rows:
        if row["variant"] == variant:
            found[row["keep"]][_name(row)] = row
    return {keep: list(same.values()) for keep, same in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m uncomp.eval.ablation.per_prompt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", nargs="+", type=Path)
    parser.add_argument("--variant", default="uncomp")
    parser.add_argument("-o", "--out", type=Path, help="CSV (default: printed)")
    args = parser.parse_args()
    rows = [json.loads(line) for file in args.rows for line in file.open()]
    lines = [{"question": "correlation", **line} for line in correlations(rows, args.variant)]
    for sign in SIGNS:
        lines += [{"question": "adaptive", **one} for one in adaptive(rows, args.variant, sign)]
    columns = ["question", "sign", "keep", "limit", "samples", "correlation", "kept", "kl"]
    columns += ["kl_equal", "difference", "low", "high"]
    target = args.out.open("w", newline="") if args.out else sys.stdout
    writer = csv.DictWriter(target, columns)
    writer.writeheader()
    writer.writerows(lines)


if __name__ == "__main__":
    main()
