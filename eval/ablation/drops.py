"""Where tokens of a prompt leave, at equal cost: several stages, or one drop and how early.

`python -m uncomp.eval.ablation.drops MODEL --stages 5,16,19,26 -o rows.jsonl`: a prompt is read
whole, then under every schedule with the same tokens times layers (`--cost`, of the whole; what
falls most in prefill time), and the full reading's own answer is followed. Scores as in
`uncomp.eval.ablation`; `python -m uncomp.eval.ablation.summary --baseline stages` makes tables.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uncomp.eval.ablation.chunked import PrunedReader
from uncomp.eval.ablation.measure import reference_spans, share_said
from uncomp.eval.run.prompts import Renderer
from uncomp.eval.tasks import registry
from uncomp.eval.tasks.base import Sample, Wanted
from uncomp.eval.tasks.scorers import score
from uncomp.pruning import CHOICES, Choice, Schedule, parse_layers

#: tokens that a chat template may add
_TEMPLATE = 256
#: a stage reads no smaller part of a prompt, or the question itself is cut
_LEAST = 0.02


def keep_for(cost: float, starts: Sequence[int], layers: int) -> float | None:
    """Fraction that enters the last stage so that tokens times layers come to `cost` of the whole.

    None: even with next to nothing in the last stage it is more, or it is less with everything.
    """
    ends = [*starts, layers]
    sizes = [end - start for start, end in zip([0, *starts], ends, strict=True)]
    # 1 - cost = (1 - keep) * sum of (stage / stages) over layers, see `Schedule.fraction`
    weight = sum(size * stage / len(starts) for stage, size in enumerate(sizes)) / layers
    keep = 1 - (1 - cost) / weight
    return keep if _LEAST <= keep <= 1 else None


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    reader = PrunedReader(args.model, torch.bfloat16 if args.bfloat16 else torch.float32)
    renderer = Renderer(reader.tokenizer, args.length + _TEMPLATE, True)
    done = set()
    if args.out.exists():
        done = {(r["task"], r["sample"]) for r in map(json.loads, args.out.open())}
    wanted = Wanted(args.length, args.samples, args.seed, reader.tokenizer, None)
    built = [task.build(wanted).samples for task in registry.find(args.tasks.split(","))]
    with args.out.open("a") as file:
        for sample in (samples[i] for i in range(args.samples) for samples in built):
            if (sample.task, sample.id) in done:
                continue
            start = time.perf_counter()
            for row in _rows(reader, renderer, sample, args):
                file.write(json.dumps({"task": sample.task, "sample": sample.id, **row}) + "\n")
            file.flush()
            seconds = time.perf_counter() - start
            print(f"{sample.task} {sample.id}: {seconds:.1f} s", file=sys.stderr)


def variants(
    stages: Sequence[int], single: Sequence[int], layers: int, cost: float
) -> Iterator[tuple[str, Schedule, float, Choice]]:
    """Schedules of one cost, and other ways to choose at the drops that are tried."""
    default, published = CHOICES["handed-on"], CHOICES["attention"]
    by_words = replace(default, pooling_kind="word", pooling=4)
    keep = keep_for(cost, stages, layers)
    if keep is not None:
        schedule = Schedule(tuple(stages), layers)
        yield "stages", schedule, keep, default
        yield "stages, published scores", schedule, keep, published
        yield "stages, by words", schedule, keep, by_words
    for layer in single:
        keep = keep_for(cost, (layer,), layers)
        if keep is not None:
            schedule = Schedule((layer,), layers)
            yield f"layer {layer}", schedule, keep, default
            yield f"layer {layer}, by words", schedule, keep, by_words


def _rows(
    reader: PrunedReader, renderer: Renderer, sample: Sample, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row a schedule; none where the whole prompt gets nothing: there is nothing to lose."""
    prompt, turn = renderer.prompt(sample, 0), sample.turns[0]
    ids, whole = prompt.ids, Schedule((), reader.layers)
    logits = reader.read(ids, whole, 1.0, CHOICES["handed-on"])
    answer = list(prompt.forced) or reader.generate(logits, len(ids), turn.max_tokens)
    full, spans = None, []
    if not prompt.forced:
        full = score(sample.metric, reader.tokenizer.decode(answer), turn, sample)
        spans = reference_spans(reader.tokenizer, answer, turn.references)
    if len(answer) < 2 or full == 0:
        return
    skip = int(sample.facts.get("skip", 0))
    reference = _followed(reader, reader.read(ids, whole, 1.0, CHOICES["handed-on"]), ids, answer)
    single = [int(layer) for layer in args.single.split(",")]
    for cost in map(float, args.cost.split(",")):
        found = variants(parse_layers(args.stages), single, reader.layers, cost)
        for name, schedule, keep, choice in found:
            logits = reader.read(ids, schedule, keep, choice)
            kept = reader.token_layers() / (len(ids) * reader.layers)
            logits = _followed(reader, logits, ids, answer)
            p, q = (x[skip:].log_softmax(-1) for x in (reference, logits))
            row = {"variant": name, "keep": cost, "kept": round(kept, 4), "full": full}
            row["kl"] = float((p.exp() * (p - q)).sum(-1).mean())
            if full is not None:
                right = (logits.argmax(-1) == torch.tensor(answer)).tolist()
                best = sample.metric == "any_reference"
                row["score"] = full * share_said(right, spans, best)
            yield row


def _followed(
    reader: PrunedReader, logits: Tensor, ids: Sequence[int], answer: Sequence[int]
) -> Tensor:
    """`[answer, vocabulary]` float32, what is predicted for each token of the answer."""
    after = reader.follow(answer[:-1], len(ids))
    return torch.cat([logits[None], after]).float()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m uncomp.eval.ablation.drops",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model")
    parser.add_argument("-o", "--out", required=True, type=Path)
    parser.add_argument("--stages", required=True, help="first layers of the later stages")
    parser.add_argument("--single", required=True, help="layers of one drop, each tried alone")
    parser.add_argument("--cost", default="0.72,0.5,0.35", help="of tokens times layers")
    parser.add_argument("--tasks", default="ruler,likelihood/repeat,likelihood/needle")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=1, help="per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
