"""`python -m uncomp.eval.ablation MODEL -o FILE`: rows of many policies over recorded prompts."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from uncomp.eval.ablation import variants
from uncomp.eval.ablation.measure import Case, measure, reference_spans
from uncomp.eval.ablation.replay import Reading, Replay
from uncomp.eval.run.prompts import Renderer
from uncomp.eval.tasks import registry
from uncomp.eval.tasks.base import Sample, Wanted
from uncomp.eval.tasks.scorers import score

_BATCH = 4


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m uncomp.eval.ablation", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("-o", "--out", required=True, type=Path)
    parser.add_argument("--tasks", default="ruler,likelihood/repeat,likelihood/needle")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", default="0.25,0.125,0.0625")
    parser.add_argument("--set", default="aware", help="list of variants")
    parser.add_argument("--agnostic", action="store_true")
    parser.add_argument("--cache", type=Path, help="folder: readings are kept there")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    replay = Replay(args.model)
    renderer = Renderer(replay.tokenizer, args.length + 256, True)
    keeps = [float(keep) for keep in args.keep.split(",")]
    done = set()
    if args.out.exists():
        done = {(r["task"], r["sample"]) for r in map(json.loads, args.out.open())}
    with args.out.open("a") as file:
        for sample in _samples(args, replay):
            if (sample.task, sample.id) in done:
                continue
            start = time.perf_counter()
            rows = _rows(replay, renderer, sample, keeps, args)
            for row in rows:
                file.write(json.dumps(row) + "\n")
            file.flush()
            full = rows[0].get("full") if rows else None
            print(
                sample.task,
                sample.id,
                full,
                len(rows),
                f"{time.perf_counter() - start:.1f} s",
                flush=True,
            )


def _samples(args: argparse.Namespace, replay: Replay) -> Iterator[Sample]:
    wanted = Wanted(args.length, args.samples, args.seed, replay.tokenizer, None)
    built = [task.build(wanted).samples for task in registry.find(args.tasks.split(","))]
    for turn in range(args.samples):
        for samples in built:
            if turn < len(samples):
                yield samples[turn]


def _rows(
    replay: Replay, renderer: Renderer, sample: Sample, keeps: list[float], args: argparse.Namespace
) -> list[dict]:
    prompt = renderer.prompt(sample, 0)
    turn = sample.turns[0]
    begun = time.perf_counter()
    full, spans = None, []
    kept = args.cache and args.cache / f"{sample.task.replace('/', '-')}-{sample.id}.pt"
    if kept and kept.exists():
        parts, answer = torch.load(kept)
        reading, replay.scale = Reading(*parts, prompt.ids), parts[1].shape[-1] ** -0.5
    else:
        reading = replay.read(prompt.ids)
        answer = list(prompt.forced) or replay.generate(reading, turn.max_tokens)
        if kept:
            args.cache.mkdir(parents=True, exist_ok=True)
            parts = reading.queries, reading.keys, reading.values, reading.logits
            torch.save((parts, answer), kept)
    read = time.perf_counter() - begun
    if not prompt.forced:
        text = replay.tokenizer.decode(answer)
        full = score(sample.metric, text, turn, sample)
        spans = reference_spans(replay.tokenizer, answer, turn.references)
    if len(answer) < 2 or full == 0:  # nothing to lose
        return []
    rest: tuple[int, ...] = ()
    if args.agnostic:
        end = prompt.context_end
        if not end:
            return []
        rest, reading = tuple(prompt.ids[end:]), reading.until(end)
    best = sample.metric == "any_reference"
    skip = int(sample.facts.get("skip", 0))
    case = Case(reading, rest, tuple(answer), skip, tuple(spans), full, best)
    everything = torch.ones(1, *reading.keys.shape[:3], dtype=torch.bool)
    reference = replay.follow(reading, everything, case.fed, len(answer) - case.known)[0]
    rows: list[dict] = []
    base = {"task": sample.task, "sample": sample.id, "full": full, "answer": len(answer)}
    batch: list[tuple[str, float, torch.Tensor]] = []

    def flush() -> None:
        if not batch:
            return
        kept = torch.stack([b[2] for b in batch])
        for (name, keep, mask), found in zip(
            batch, measure(replay, case, kept, reference), strict=True
        ):
            share = float(mask.float().mean())
            rows.append({**base, "variant": name, "keep": keep, "kept": round(share, 4), **found})
        batch.clear()

    scored = time.perf_counter()
    for keep in keeps:
        for name, mask in variants.masks(args.set, reading, replay, keep, bool(rest)):
            batch.append((name, keep, mask))
            if len(batch) == _BATCH:
                flush()
        flush()
    variants.forget()
    print(f"   read {read:.1f} s, variants {time.perf_counter() - scored:.1f} s")
    return rows


if __name__ == "__main__":
    main()
