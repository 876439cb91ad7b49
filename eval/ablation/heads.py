"""Does entropy know what a head needs? `python -m uncomp.eval.ablation.heads FILE...`

Rank correlations between the entropies and the importance of a calibration file, as CSV: over all
heads, and between the heads of one layer (mean over layers; with two heads each is 1 or -1).

With `--between`, does what a head needs depend on the text? Correlation (Pearson) over heads of the
importance in each file with that in the first; all of one model, calibrated on different texts.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from typing import Any

import torch
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


def between(
    first: Calibration, other: Calibration, names: tuple[str, str], keeps: list[float]
) -> Iterator[dict[str, Any]]:
    """A row a keep ratio."""
    for keep in keeps:
        pair = [file.head_importance().at(keep).flatten() for file in (first, other)]
        correlation = float(torch.corrcoef(torch.stack(pair))[0, 1])
        yield {
            "model": first.model,
            "keep": keep,
            "texts": " / ".join(names),
            "correlation": round(correlation, 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m uncomp.eval.ablation.heads",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", help="of `uncomp calibrate`")
    parser.add_argument("--keep", default="0.33,0.125", help="keep ratios (default: 0.33,0.125)")
    parser.add_argument("--between", action="store_true", help="files of one model, at least two")
    args = parser.parse_args()
    keeps = [float(keep) for keep in args.keep.split(",")]
    files = [load(file) for file in args.files]
    if args.between:
        texts = ["+".join(text["name"] for text in file.text) for file in files]
        found = [
            row
            for file, name in zip(files[1:], texts[1:], strict=True)
            for row in between(files[0], file, (texts[0], name), keeps)
        ]
    else:
        found = [row for file in files for row in rows(file, keeps)]
    writer = csv.DictWriter(sys.stdout, found[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)


if __name__ == "__main__":
    main()
