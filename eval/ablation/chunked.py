"""Prefill token pruning of whole prompts against pruning chunk by chunk, on a Hugging Face model.

`python -m uncomp.eval.ablation.chunked MODEL --stages 5,16,19,26 -o rows.jsonl`: every prompt is
read whole and in chunks of several sizes. Each chunk is thinned by its own last queries, attends to
what the chunks before it have left in each layer, and the last one ends with the question. Answers
are generated and scored. `python -m uncomp.eval.ablation.summary --baseline whole` makes tables.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uncomp.eval.ablation.replay import load
from uncomp.eval.run.prompts import Renderer
from uncomp.eval.tasks import registry
from uncomp.eval.tasks.base import Sample, Wanted
from uncomp.eval.tasks.scorers import score
from uncomp.pruning import CHOICES, WIDEST, Choice, Schedule, choose_tokens, parse_layers
from uncomp.spans import Vocabulary, places

_NAME = "uncomp_chunked"
#: as in the engine
_SINKS, _RECENT = 4, 32
#: tokens that a chat template may add
_TEMPLATE = 256


@dataclass
class _Layer:
    """What a layer holds: keys and values `[H, n, d]`, positions `[n]`; the last queries it saw."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    queries: Tensor | None = None


class PrunedReader:
    """A model whose layers are run one by one, so that rows can leave between them.

    Args:
        model: folder or hub name.
        dtype: of weights and activations.
    """

    def __init__(self, model: str, dtype: torch.dtype = torch.float32) -> None:
        self.tokenizer, self.model = load(model, dtype, _NAME, self._attend)
        self.layers = len(self.model.model.layers)
        self.held: list[_Layer] = []
        self._at = torch.zeros(0, dtype=torch.int64)
        self._scale = 0.0
        self._places = torch.zeros(0, dtype=torch.int32)
        self._vocabulary: Vocabulary | None = None

    @torch.inference_mode()
    def read(
        self, ids: Sequence[int], schedule: Schedule, keep: float, choice: Choice, chunk: int = 0
    ) -> Tensor:
        """Read a prompt.

        Args:
            schedule: first layers of the stages.
            keep: fraction of a chunk that enters the last stage; 1: nothing leaves.
            choice: which tokens go on.
            chunk: tokens of a chunk; 0: all in one. A last chunk of less than half joins the one
                before, so that the question is not alone in it.

        Returns:
            `[vocabulary]`, logits after the prompt.
        """
        self.held = [_Layer() for _ in range(self.layers)]
        if choice.pooling_kind == "word":
            self._vocabulary = self._vocabulary or Vocabulary.of(self.tokenizer)
            gaps = self._vocabulary.gaps(ids).tobytes()
            self._places = torch.from_numpy(places(gaps, len(ids)))
        size = chunk or len(ids)
        chunks = list(range(0, len(ids), size))
        if len(chunks) > 1 and len(ids) - chunks[-1] < size / 2:
            chunks.pop()
        logits = torch.zeros(0)
        for start, end in zip(chunks, [*chunks[1:], len(ids)], strict=True):
            logits = self._pass(ids[start:end], start, (schedule, keep, choice))[0]
        return logits

    @torch.inference_mode()
    def generate(self, logits: Tensor, start: int, count: int) -> list[int]:
        """The greedy answer after `read`, without the end token.

        Args:
            logits: of `read`. start: tokens of the prompt. count: tokens at most.
        """
        end = self.model.generation_config.eos_token_id
        ends = set(end) if isinstance(end, list) else {end}
        answer: list[int] = []
        token = int(logits.argmax())
        while len(answer) < count and token not in ends:
            answer.append(token)
            token = int(self._pass([token], start + len(answer) - 1, None)[0].argmax())
        return answer

    @torch.inference_mode()
    def follow(self, ids: Sequence[int], start: int) -> Tensor:
        """Logits after every token of a text that follows the prompt, `[n, vocabulary]`.

        Args:
            ids: n tokens. start: tokens of the prompt.
        """
        return self._pass(ids, start, None, len(ids))

    def token_layers(self) -> int:
        """Tokens that are held, summed over layers."""
        return sum(len(at) for layer in self.held for at in layer.positions)

    def _pass(
        self,
        ids: Sequence[int],
        start: int,
        pruned: tuple[Schedule, float, Choice] | None,
        last: int = 1,
    ) -> Tensor:
        """Logits after the `last` tokens, `[last, vocabulary]`."""
        inner = self.model.model
        self._at = torch.arange(start, start + len(ids))
        hidden = inner.embed_tokens(torch.tensor([list(ids)]))
        counts: dict[int, int] = {}
        if pruned is not None:
            schedule, keep, _ = pruned
            forced = _SINKS + _RECENT
            if len(ids) > forced:
                found = schedule.kept(len(ids), keep, 1, forced)
                counts = dict(zip(schedule.starts, found, strict=True))
        for index, layer in enumerate(inner.layers):
            if index in counts:
                assert pruned is not None
                go = self._choose(self.held[index - 1], counts[index], pruned[2])
                hidden, self._at = hidden[:, go], self._at[go]
            cos_sin = inner.rotary_emb(hidden, self._at[None])
            out = layer(hidden, position_ids=self._at[None], position_embeddings=cos_sin)
            hidden = out[0] if isinstance(out, tuple) else out
        return self.model.lm_head(inner.norm(hidden[:, hidden.shape[1] - last :]))[0]

    def _choose(self, before: _Layer, keep: int, choice: Choice) -> Tensor:
        """[keep] indices into the rows of this chunk; see the engine's pruner."""
        assert before.queries is not None
        queries = before.queries  # [H, G, w, d]
        at = self._at
        count = queries.shape[2]
        scores = choice.scores(queries, before.keys[-1], at[-count:], at, self._scale)
        stand = self._places[at] if choice.pooling_kind == "word" else None
        return choose_tokens(scores, at < _SINKS, _RECENT, keep, choice, stand)

    def _attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        self._scale = scaling or query.shape[-1] ** -0.5
        held = self.held[module.layer_idx]
        held.keys.append(key[0])
        held.values.append(value[0])
        held.positions.append(self._at)
        held.queries = query[0, :, -WIDEST:].unflatten(0, (key.shape[1], -1))
        keys, values = torch.cat(held.keys, 1)[None], torch.cat(held.values, 1)[None]
        seen = torch.cat(held.positions) <= self._at[:, None]
        out = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=seen, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    reader = PrunedReader(args.model, torch.bfloat16 if args.bfloat16 else torch.float32)
    renderer = Renderer(reader.tokenizer, args.length + _TEMPLATE, True)
    schedule = Schedule(parse_layers(args.stages), reader.layers)
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
            ids = renderer.prompt(sample, 0).ids
            for row in _rows(reader, ids, sample, schedule, args):
                file.write(json.dumps({"task": sample.task, "sample": sample.id, **row}) + "\n")
            file.flush()
            seconds = time.perf_counter() - start
            print(f"{sample.task} {sample.id}: {seconds:.1f} s", file=sys.stderr)


def _rows(
    reader: PrunedReader, ids: Sequence[int], sample: Sample, schedule: Schedule, args: Any
) -> Iterator[dict[str, Any]]:
    turn = sample.turns[0]

    def ask(logits: Tensor) -> float:
        answer = reader.generate(logits, len(ids), turn.max_tokens)
        return score(sample.metric, reader.tokenizer.decode(answer), turn, sample)

    choice = CHOICES[args.scores]
    reference = reader.read(ids, schedule, 1.0, choice)
    full = ask(reference)
    for keep in map(float, args.keep.split(",")):
        for chunk in (0, *map(int, args.chunks.split(","))):
            logits = reader.read(ids, schedule, keep, choice, chunk)
            kept = reader.token_layers() / (len(ids) * reader.layers)
            p, q = (x.float().log_softmax(-1) for x in (reference, logits))
            yield {
                "variant": f"chunks of {chunk}" if chunk else "whole",
                "keep": keep,
                "kept": round(kept, 4),
                "kl": float((p.exp() * (p - q)).sum()),
                "full": full,
                "score": ask(logits),
            }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m uncomp.eval.ablation.chunked",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model")
    parser.add_argument("-o", "--out", required=True, type=Path)
    parser.add_argument("--stages", required=True, help="first layers of the later stages")
    parser.add_argument("--tasks", default="ruler")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=2, help="per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", default="0.5,0.375", help="fraction that enters the last stage")
    parser.add_argument("--chunks", default="512,1024", help="tokens")
    parser.add_argument("--scores", default="handed-on", choices=list(CHOICES))
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
