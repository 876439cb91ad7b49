"""The files of a report."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uncomp.eval.report import stats
from uncomp.eval.report.analysis import Analysis, analyse
from uncomp.eval.report.contents import document
from uncomp.eval.report.inputs import Held, Throughput
from uncomp.eval.report.markdown import markdown
from uncomp.eval.report.page import html
from uncomp.eval.report.rows import rows, write_rows
from uncomp.eval.run.records import Scored

FLIPS = ("method", "keep", "change", "task", "sample", "turn", "metric", "full", "value")


def write_report(
    scored: Sequence[Scored],
    facts: Mapping[str, Any],
    folder: Path,
    throughput: Sequence[Throughput] = (),
    held: Sequence[Held] = (),
    resamples: int = stats.RESAMPLES,
) -> list[Path]:
    """Write ``report.html``, ``report.md``, ``rows.csv``, ``flips.csv`` and ``plots/*.svg``.

    Args:
        scored: of one run, each answer once per metric; the order of methods is kept.
        facts: of the run, see :mod:`uncomp.eval.report.facts`.
        folder: made if missing; files of these names are replaced.
        throughput, held: measured speed and memory, if any.
        resamples: bootstrap replicates per interval; seconds of time grow with it.

    Returns:
        The files written, the HTML page first.

    Raises:
        ValueError: nothing was scored, or an answer was scored twice.
        ImportError: scipy, matplotlib or jinja2 is missing; says how to install it.
    """
    analysis = analyse(scored, resamples)
    report = document(analysis, scored, facts, throughput, held, resamples)
    texts = {"report.html": html(report), "report.md": markdown(report)}
    texts |= {f"plots/{picture.name}.svg": picture.svg for picture in report.pictures()}
    folder = Path(folder)
    written = []
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    written.insert(2, write_rows(rows(analysis, facts), folder / "rows.csv"))
    written.insert(3, _write_flips(analysis, folder / "flips.csv"))
    return written


def _write_flips(analysis: Analysis, path: Path) -> Path:
    """Every answer whose verdict changed; not small, not for the repository."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FLIPS)
        for found in analysis.flips:
            for change, flips in (("lost", found.lost), ("gained", found.gained)):
                case = (found.case.method, f"{found.case.keep:g}", change)
                for f in flips:
                    values = (f"{f.full:.6g}", f"{f.value:.6g}")
                    writer.writerow((*case, f.task, f.sample, f.turn, f.metric, *values))
    return path
