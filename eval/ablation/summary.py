"""Rows of `python -m uncomp.eval.ablation` as one small table.

`python -m uncomp.eval.ablation.summary rows.jsonl -o table.csv --model NAME --length 2048` writes a
line a variant and keep ratio: the mean over tasks of the estimated score, its difference to the
baseline with a paired 95 % bootstrap interval, and KL divergence from the full cache. Without -o it
prints them.
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

from uncomp.eval.report.stats import Values, difference, estimate

BASELINE = "snapkv"

#: task -> sample -> turn -> value
Tasks = dict[str, dict[str, dict[int, float]]]


def table(rows: Iterable[Mapping[str, Any]], baseline: str = BASELINE) -> list[dict[str, Any]]:
    """A line a variant and keep ratio, in the order of the rows.

    Args:
        rows: of `eval.ablation`; a sample that is there twice counts with its last row.
        baseline: variant that the others are compared with.
    """
    scores: dict[tuple[str, float], Tasks] = defaultdict(lambda: defaultdict(dict))
    divergences: dict[tuple[str, float], Tasks] = defaultdict(lambda: defaultdict(dict))
    full: Tasks = defaultdict(dict)
    kept: dict[tuple[str, float], list[float]] = defaultdict(list)
    for row in rows:
        case, sample = (row["variant"], row["keep"]), row["sample"]
        divergences[case][row["task"]][sample] = {0: row["kl"]}
        kept[case].append(row["kept"])
        if row.get("full") is not None:
            scores[case][row["task"]][sample] = {0: 100 * row["score"]}
            full[row["task"]][sample] = {0: 100 * row["full"]}
    whole = estimate(list(full.values())) if full else None
    lines = []
    for case, of in divergences.items():
        line: dict[str, Any] = {
            "variant": case[0],
            "keep": case[1],
            "kept": round(sum(kept[case]) / len(kept[case]), 4),
            "kl": round(estimate(list(of.values())).mean, 4),
            "kl_samples": sum(map(len, of.values())),
        }
        if case in scores and whole is not None:
            mean = estimate(list(scores[case].values()))
            line |= {"score": round(mean.mean, 2), "full": round(whole.mean, 2)}
            line |= {"samples": mean.n, "tasks": mean.tasks}
            line |= _against(scores[case], scores.get((baseline, case[1])))
        lines.append(line)
    return lines


def _against(case: Tasks, baseline: Tasks | None) -> dict[str, Any]:
    if baseline is None:
        return {}
    pairs: list[tuple[Values, Values]] = [(case[task], baseline.get(task, {})) for task in case]
    found = difference(pairs)
    if found is None:
        return {}
    ends = found.interval
    return {
        "difference": round(found.difference, 2),
        "low": None if ends.low is None else round(ends.low, 2),
        "high": None if ends.high is None else round(ends.high, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m uncomp.eval.ablation.summary",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", nargs="+", type=Path)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--model", default="", help="written into every line")
    parser.add_argument("--length", type=int, default=0, help="written into every line")
    parser.add_argument("--baseline", default=BASELINE, help="variant to compare with")
    args = parser.parse_args()
    rows = (json.loads(line) for file in args.rows for line in file.open())
    lines = table(rows, args.baseline)
    facts = {"model": args.model, "length": args.length}
    columns = [*facts, "variant", "keep", "kept", "score", "full", "difference", "low", "high"]
    columns += ["samples", "tasks", "kl", "kl_samples"]
    target = args.out.open("w", newline="") if args.out else sys.stdout
    writer = csv.DictWriter(target, columns)
    writer.writeheader()
    writer.writerows({**facts, **line} for line in lines)


if __name__ == "__main__":
    main()
