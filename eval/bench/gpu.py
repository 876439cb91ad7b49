"""``python -m uncomp.eval.bench gpu``: check every kernel on a GPU, then time it, then the engine.

checks   kernels, captured graph and compaction against the references; a wrong one ends the run
kernels  decode attention, compaction against prefill, ways to the entropy (no vLLM needed)
engine   vLLM at Llama-3.1-8B's shape with dummy weights, compressed against full KV

Rows go to gpu.csv after every step; what that file holds of other steps stays, so that a run can be
cut into pieces (--part, --only).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from uncomp.eval.bench import rows as rows_
from uncomp.eval.bench.rows import Row

if TYPE_CHECKING:
    import torch

PARTS = ("checks", "kernels", "engine")


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 when all is right and every bar reached, 1 when not, 2 where nothing could run."""
    given = _parser().parse_args(arguments)
    if given.dry_run:
        # Read by Triton when the kernels' modules are imported.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not given.dry_run and not torch.cuda.is_available():
        say("no CUDA device here; `--dry-run` runs everything at toy sizes on the CPU")
        return 2
    device = torch.device("cpu" if given.dry_run else "cuda")
    # Engines take minutes to start: a dry run has them only when asked.
    parts = given.part or (PARTS[:2] if given.dry_run else PARTS)
    found: list[Row] = []
    skipped: list[str] = []
    for part in PARTS:
        if part not in parts:
            continue
        for fresh in _steps(part, device, given, skipped):
            found += fresh
            if not given.dry_run:
                _write(fresh, given.results, given.commit)
        if part == "checks" and rows_.missed(found):
            say("a check failed: nothing is timed")
            break
    print(rows_.table(found))
    if skipped and not found:
        return 2
    return 1 if rows_.missed(found) else 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    from uncomp.eval.bench.gpu_scenarios import NAMES

    parser = argparse.ArgumentParser(
        prog="python -m uncomp.eval.bench gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, help="default: all")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="scenarios of engine")
    parser.add_argument("--cap", type=float, default=420, help="seconds an engine may take")
    parser.add_argument("--results", type=Path, default=rows_.RESULTS, help="folder of gpu.csv")
    parser.add_argument("--commit", help="of this code, where it is no repository")
    parser.add_argument(
        "--dry-run", action="store_true", help="toy sizes on the CPU, no rows, no bars but checks'"
    )
    return parser


def _steps(
    part: str, device: torch.device, given: argparse.Namespace, skipped: list[str]
) -> Iterator[list[Row]]:
    """Rows of a part, step by step."""
    dry = given.dry_run
    if part == "checks":
        from uncomp.eval.bench import gpu_checks

        yield gpu_checks.bench(device, dry, say)
    elif part == "kernels":
        from uncomp.eval.bench import gpu_kernels

        for found in gpu_kernels.bench(device, dry, say):
            yield _unjudged(found) if dry else found
    else:
        from uncomp.eval.bench import gpu_engine

        reason = gpu_engine.unusable(dry)
        if reason:
            say(f"SKIPPED engine: {reason}")
            skipped.append(part)
            return
        _give_back()
        for found in gpu_engine.bench(given.only, given.cap, dry, say):
            yield _unjudged(found) if dry else found


def _give_back() -> None:
    """Memory that earlier parts had on the GPU: engines are other processes."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _unjudged(found: list[Row]) -> list[Row]:
    """Toy sizes say nothing about bars."""
    return [replace(row, bar="", verdict="") for row in found]


def _write(found: list[Row], folder: Path, commit: str | None) -> None:
    from uncomp.eval.bench.gpu_timing import facts

    say(f"rows written to {rows_.merge(found, folder / 'gpu.csv', facts(commit))}")
