"""Does entropy know what a head needs? `python -m uncomp.eval.ablation.heads FILE...`

Rank correlations between the entropies and the importance of a calibration file, as CSV: over all
heads, and between the heads of one layer (mean over layers; with two heads each is 1 or -1).
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from uncomp.calibration.file import Calibration, load
from uncomp.config import MEASURES, SOURCES


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of all elements; 0 where one side has a single value."""
    from scipy.stats import spearmanr

    if a.unique().numel() == 1 or b.unique().numel() == 1:
        return 0.0
    return float(spearmanr(a.flatten().numpy(), b.flatten().numpy()).statistic)


def rows(calibration: Calibration, keeps: list[float]) -> Iterator[dict[str, Any]]:
    """A row a keep ratio, source and measure.

    Raises:
        CalibrationError: the file holds no importance.
    """
    importance = calibration.head_importance()
    for keep in keeps:
        needs = importance.at(keep)
        for source in SOURCES:
            for measure in MEASURES:
                entropy = calibration.scores(source, measure)
                within = [spearman(e, n) for e, n in zip(entropy, needs, strict=True)]
                yield {
                    "model": calibration.model,
                    "keep": keep,
                    "source": source,
                    "measure": measure,
                    "all_heads": round(spearman(entropy, needs), 3),
                    "within_layers": round(sum(within) / len(within), 3),
                }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m uncomp.eval.ablation.heads",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", help="of `uncomp calibrate`")
    parser.add_argument("--keep", default="0.33,0.125", help="keep ratios (default: 0.33,0.125)")
    args = parser.parse_args()
    keeps = [float(keep) for keep in args.keep.split(",")]
    found = [row for file in args.files for row in rows(load(file), keeps)]
    writer = csv.DictWriter(sys.stdout, found[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)


if __name__ == "__main__":
    main()
