"""Many policies over recorded prompts: `python -m uncomp.eval.ablation MODEL -o FILE`.

A prompt is read once; then every variant of a set follows the full cache's own answer with what it
keeps (see `replay`). A row a sample, variant and keep ratio, as JSON lines; a file that is there is
continued. `python -m uncomp.eval.ablation.summary` makes tables of them.

Scores are estimates: a reference counts where the full cache's answer has it and every token of it
is still the most probable one. What is decided here is confirmed on the engine with `uncomp eval`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uncomp.calibration.file import load
from uncomp.eval.ablation import variants
from uncomp.eval.ablation.measure import Case, measure, reference_spans, signs
from uncomp.eval.ablation.replay import Reading, Replay
from uncomp.eval.ablation.shared import entropy, forget, windows
from uncomp.eval.run.prompts import Prompt, Renderer
from uncomp.eval.tasks import registry
from uncomp.eval.tasks.base import Sample, Wanted
from uncomp.eval.tasks.scorers import score

#: variants that are followed together; more would save little and take memory
_BATCH = 4
#: tokens that a chat template may add
_TEMPLATE = 256


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    measured = load(args.calibration).head_importance() if args.calibration else None
    replay = Replay(args.model, importance=measured)
    renderer = Renderer(replay.tokenizer, args.length + _TEMPLATE, True)
    done = set()
    if args.out.exists():
        done = {(r["task"], r["sample"]) for r in map(json.loads, args.out.open())}
    with args.out.open("a") as file:
        for sample in _samples(args, replay):
            if (sample.task, sample.id) in done:
                continue
            start = time.perf_counter()
            case = _case(replay, renderer, sample, args)
            rows = [] if case is None else _rows(replay, case, args)
            for row in rows:
                file.write(json.dumps({"task": sample.task, "sample": sample.id, **row}) + "\n")
            file.flush()
            seconds = time.perf_counter() - start
            print(f"{sample.task} {sample.id}: {len(rows)} rows, {seconds:.1f} s", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m uncomp.eval.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model")
    parser.add_argument("-o", "--out", required=True, type=Path)
    parser.add_argument("--tasks", default="ruler,likelihood/repeat,likelihood/needle")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=2, help="per task")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", default="0.25,0.125,0.0625")
    parser.add_argument("--set", default="final", choices=list(variants.SETS))
    parser.add_argument(
        "--agnostic", action="store_true", help="compress before the question is read"
    )
    parser.add_argument(
        "--calibration", type=Path, help="file of `uncomp calibrate`, for some sets"
    )
    parser.add_argument("--cache", type=Path, help="folder: readings are kept there")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def _samples(args: argparse.Namespace, replay: Replay) -> Iterator[Sample]:
    """One sample of every task, then the next: a run that is stopped has seen all tasks."""
    wanted = Wanted(args.length, args.samples, args.seed, replay.tokenizer, None)
    built = [task.build(wanted).samples for task in registry.find(args.tasks.split(","))]
    for turn in range(args.samples):
        for samples in built:
            if turn < len(samples):
                yield samples[turn]


def _case(
    replay: Replay, renderer: Renderer, sample: Sample, args: argparse.Namespace
) -> Case | None:
    """The sample, read and answered with the full cache; None where there is nothing to lose."""
    prompt, turn = renderer.prompt(sample, 0), sample.turns[0]
    name = f"{sample.task.replace('/', '-')}-{args.length}-{sample.id}.pt"
    reading, answer = _read(
        replay, prompt, turn.max_tokens, args.cache / name if args.cache else None
    )
    full, spans = None, []
    if not prompt.forced:
        full = score(sample.metric, replay.tokenizer.decode(answer), turn, sample)
        spans = reference_spans(replay.tokenizer, answer, turn.references)
    if len(answer) < 2 or full == 0 or (args.agnostic and not prompt.context_end):
        return None
    rest: tuple[int, ...] = ()
    if args.agnostic:
        rest = prompt.ids[prompt.context_end :]
        reading = reading.until(prompt.context_end)
    return Case(
        reading,
        rest,
        tuple(answer),
        int(sample.facts.get("skip", 0)),
        tuple(spans),
        full,
        sample.metric == "any_reference",
    )


def _read(
    replay: Replay, prompt: Prompt, count: int, file: Path | None
) -> tuple[Reading, list[int]]:
    """A reading and the full cache's answer (or the forced one), from the file if it is there."""
    if file is not None and file.exists():
        (queries, keys, values, logits), answer = torch.load(file)
        replay.scale = keys.shape[-1] ** -0.5
        return Reading(queries, keys, values, logits, prompt.ids), answer
    reading = replay.read(prompt.ids)
    answer = list(prompt.forced) or replay.generate(reading, count)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        parts = reading.queries, reading.keys, reading.values, reading.logits
        torch.save((parts, answer), file)
    return reading, answer


def _rows(replay: Replay, case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    everything = torch.ones(1, *case.reading.keys.shape[:3], dtype=torch.bool)
    reference = replay.follow(case.reading, everything, case.fed, len(case.answer) - case.known)[0]
    rows: list[dict[str, Any]] = []
    batch: list[tuple[str, float, Tensor]] = []
    attention = windows(case.reading, replay)[32, "sum", "sum"]
    h = entropy(case.reading, "renormalized")

    def follow() -> None:
        found = measure(replay, case, torch.stack([mask for _, _, mask in batch]), reference)
        for (name, keep, mask), values in zip(batch, found, strict=True):
            kept = round(float(mask.float().mean()), 4)
            values |= signs(attention, mask, h)
            rows.append({"full": case.full, "variant": name, "keep": keep, "kept": kept, **values})
        batch.clear()

    for keep in map(float, args.keep.split(",")):
        for name, mask in variants.masks(args.set, case.reading, replay, keep):
            batch.append((name, keep, mask))
            if len(batch) == _BATCH:
                follow()
        if batch:
            follow()
    forget()
    return rows


if __name__ == "__main__":
    main()
