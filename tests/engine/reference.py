"""A slow reference of a compressed engine: the whole cache is kept, dropped entries are masked.

One Hugging Face forward pass over prompt and generated tokens computes what the engine computed
step by step, if every query sees exactly the keys that were in the engine's cache at its time: all
earlier ones until the first compaction, and after a compaction of `num_tokens` tokens, for queries
at positions >= num_tokens, only what each KV head of each layer kept.

A preempted request starts over: prompt and tokens generated so far are computed again, with a full
cache, so the keys and values of *all* positions change. Each such epoch has its own forward pass;
the trace shows where one begins (the generation starts again at 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ATTENTION = "uncomp_test_reference"


@dataclass(frozen=True)
class Compaction:
    """One record of the engine's trace.

    Attributes:
        num_tokens: tokens computed when it ran; the query at this position is the first after it.
        tail: first position that was not up for choice (everything from here on stays).
        kept: [layers][KV heads] kept positions below `tail`.
    """

    num_tokens: int
    tail: int
    kept: Sequence[Sequence[Sequence[int]]]

    @classmethod
    def of(cls, record: dict[str, Any]) -> Compaction:
        tail = record["full_blocks"] * record["block_size"]
        return cls(record["num_tokens"], tail, record["kept"])


def epochs(records: Sequence[dict[str, Any]]) -> list[list[Compaction]]:
    """Trace records of one request, in the order written, split where it was started over."""
    found: list[list[Compaction]] = []
    for record in records:
        if record["generation"] == 1:
            found.append([])
        found[-1].append(Compaction.of(record))
    return found


class Reference:
    """The model under its own attention function.

    Args:
        path: checkpoint.
        dtype: of weights and activations; scores and softmax are float32 in any case.
    """

    def __init__(self, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register(ATTENTION, self._attend)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=ATTENTION
        )
        self.model = model.eval()
        self._compactions: Sequence[Compaction] = ()
        self._pruned: dict[str, Any] | None = None

    def logprobs(
        self,
        prompt: Sequence[int],
        generated: Sequence[int],
        trace: Sequence[dict[str, Any]] = (),
        pruned: Sequence[dict[str, Any]] = (),
    ) -> Tensor:
        """Log-probabilities [generated, vocabulary] float32 of every next token, teacher-forced.

        Args:
            trace: the request's trace records in the order written; empty: nothing was dropped.
            pruned: the same of what stopped on the way through the layers, one per epoch.
        """
        runs = epochs(trace) or [[] for _ in pruned or [None]]
        first = len(prompt)
        # Token at position p was drawn from the logits of position p - 1. An epoch after the first
        # begins by computing all tokens known then, and draws the next one.
        # A pruned prompt is compacted, if at all, in the step that prunes it.
        again = [record["num_tokens"] for record in pruned[1:]]
        begins = [first, *(again or [run[0].num_tokens for run in runs[1:]])]
        ends = [*begins[1:], first + len(generated)]
        tokens = [*prompt, *generated]
        parts = []
        for epoch, (run, begin, end) in enumerate(zip(runs, begins, ends, strict=True)):
            if end > begin:
                self._pruned = pruned[epoch] if pruned else None
                parts.append(self._forward(tokens[: end - 1], run, end - begin))
        return torch.cat(parts)

    @torch.inference_mode()
    def _forward(self, tokens: list[int], compactions: list[Compaction], count: int) -> Tensor:
        self._compactions = compactions
        hidden = self.model.base_model(torch.tensor([tokens]), use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden[0, -count:])
        return logits.float().log_softmax(-1)

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """query [1, query heads, T, d], key and value [1, KV heads, T, d], after RoPE."""
        heads, length, size = key.shape[1:]
        grouped = query[0].unflatten(0, (heads, -1))
        hidden = self._hidden(module.layer_idx, heads, length).unsqueeze(1)
        scale = kwargs.get("scaling") or 1 / math.sqrt(size)
        scores = grouped.float() @ key[0].float().transpose(-1, -2).unsqueeze(1) * scale
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
        mixed = weights @ value[0].float().unsqueeze(1)
        return mixed.flatten(0, 1).transpose(0, 1).unsqueeze(0).to(query.dtype), None

    def _hidden(self, layer: int, heads: int, length: int) -> Tensor:
        """[KV heads, queries, keys] bool, True where a query does not see a key."""
        position = torch.arange(length)
        hidden = (position > position.unsqueeze(1)).repeat(heads, 1, 1)
        if self._pruned is not None:
            hidden |= self._stopped(layer, length).unsqueeze(0)
        for compaction in self._compactions:
            if compaction.num_tokens >= length:
                continue
            dropped = position.expand(heads, -1) < compaction.tail
            for head, kept in enumerate(compaction.kept[layer]):
                dropped[head, torch.tensor(kept, dtype=torch.int64)] = (
                    False  # a head may keep nothing
                )
            hidden[:, compaction.num_tokens :] |= dropped.unsqueeze(1)
        return hidden

    def _stopped(self, layer: int, length: int) -> Tensor:
        """[queries, keys] bool: keys of tokens that did not come as far as this layer.

        Such a token goes on seeing itself; what becomes of it is of no interest to the others.
        """
        assert self._pruned is not None
        stage = sum(start <= layer for start in self._pruned["starts"]) - 1
        stopped = torch.arange(length) < self._pruned["num_tokens"]
        stopped[torch.tensor(self._pruned["kept"][stage])] = False
        return stopped.expand(length, -1) & ~torch.eye(length, dtype=torch.bool)
