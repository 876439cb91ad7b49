"""A Hugging Face model that reads a prompt once and then answers from any part of its cache.

What a policy keeps decides what the answer's tokens attend to, and nothing else: so one pass over
the prompt serves every policy, and many policies are one batch. Answers are given, not generated
(teacher forcing), so that a policy costs one short pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uncomp.importance import Importance

_NAME = "uncomp_replay"


@dataclass(frozen=True)
class Reading:
    """What a model has of a prompt.

    L: layers, H: KV heads, G: query heads per KV head, N: tokens, d: head size.

    Attributes:
        queries: `[L, H, G, N, d]`, after RoPE.
        keys, values: `[L, H, N, d]`, keys after RoPE.
        logits: `[vocabulary]`, of the token after the prompt.
        ids: the N tokens.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    logits: Tensor
    ids: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.keys.shape[2]

    def until(self, end: int) -> Reading:
        """The part before token `end` (its logits are not known)."""
        part = self.queries[..., :end, :], self.keys[..., :end, :], self.values[..., :end, :]
        return Reading(*part, self.logits.new_empty(0), self.ids[:end])


def load(model: str, dtype: torch.dtype, name: str, attend: Any) -> tuple[Any, Any]:
    """Tokenizer and model, with an attention function of one's own that is given no mask.

    Args:
        model: folder or hub name. dtype: of weights and activations.
        name: of the attention function, one per caller.
        attend: follows the interface of Hugging Face's attention functions.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, lambda *_, **__: None)
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=name)
    return tokenizer, loaded.eval()


class Replay:
    """Wraps a causal language model of Hugging Face whose attention follows its interface.

    Args:
        model: folder or hub name.
        dtype: of weights and activations.
        importance: what the heads need, for variants that use it.
    """

    def __init__(
        self,
        model: str,
        dtype: torch.dtype = torch.float32,
        importance: Importance | None = None,
    ) -> None:
        self.importance = importance
        self.tokenizer, self.model = load(model, dtype, _NAME, self._attend)
        config = self.model.config.get_text_config()
        self.layers: int = config.num_hidden_layers
        self.scale: float = 0.0  # of the attention logits; known after the first reading
        self._recorded: list[tuple[Tensor, Tensor, Tensor]] = []
        self._cache: list[tuple[Tensor, Tensor, Tensor]] | None = None
        self._grown: list[tuple[Tensor, Tensor]] | None = None
        self._most: list[Tensor] | None = None

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> Reading:
        """One pass over a prompt."""
        self._recorded, self._cache = [], None
        logits = self._run(torch.tensor([list(ids)]), 0, last=True)[0, -1]
        queries, keys, values = (torch.stack(part) for part in zip(*self._recorded, strict=True))
        self._recorded = []
        return Reading(queries.unflatten(1, (keys.shape[1], -1)), keys, values, logits, tuple(ids))

    @torch.inference_mode()
    def generate(self, reading: Reading, count: int) -> list[int]:
        """The greedy answer with the full cache, at most `count` tokens, without the end token."""
        end = self.model.generation_config.eos_token_id
        ends = set(end) if isinstance(end, list) else {end}
        lengths = torch.ones(1, reading.keys.shape[1], reading.tokens, dtype=torch.bool)
        self._cache = [
            (reading.keys[i, None], reading.values[i, None], lengths) for i in range(self.layers)
        ]
        self._grown = [
            (reading.keys[i, None, :, :0], reading.values[i, None, :, :0])
            for i in range(self.layers)
        ]
        answer: list[int] = []
        token = int(reading.logits.argmax())
        while len(answer) < count and token not in ends:
            answer.append(token)
            place = reading.tokens + len(answer) - 1
            token = int(self._run(torch.tensor([[token]]), place, last=True)[0, -1].argmax())
        self._grown = self._cache = None
        return answer

    @torch.inference_mode()
    def follow(self, reading: Reading, kept: Tensor, ids: Sequence[int], last: int) -> Tensor:
        """Logits after the last tokens of a text that follows the prompt.

        Args:
            kept: `[V, L, H, N]` bool, what each of V policies keeps of the prompt.
            ids: the text, A tokens; they see each other.
            last: tokens at its end whose logits are wanted.

        Returns:
            `[V, last, vocabulary]`.
        """
        self._cache = [_gathered(reading, layer, kept[:, layer]) for layer in range(self.layers)]
        batch = torch.tensor([list(ids)]).expand(len(kept), -1)
        logits = self._run(batch, reading.tokens, last)
        self._cache = None
        return logits

    @torch.inference_mode()
    def reread(self, reading: Reading, ids: Sequence[int]) -> Tensor:
        """What a text that follows the prompt attends to most, `[L, H, N]` (KVzip's score).

        The largest attention that any of its tokens pays to each entry of the prompt.
        """
        lengths = torch.ones(1, reading.keys.shape[1], reading.tokens, dtype=torch.bool)
        self._cache = [
            (reading.keys[i, None], reading.values[i, None], lengths) for i in range(self.layers)
        ]
        self._most = []
        self._run(torch.tensor([list(ids)]), reading.tokens, last=True)
        most, self._most, self._cache = torch.stack(self._most), None, None
        return most

    def rotate(self, x: Tensor, offsets: Tensor) -> Tensor:
        """RoPE: vectors `[..., n, d]` moved by `[n]` positions."""
        inner = self.model.model
        angles = offsets[:, None].float() * inner.rotary_emb.inv_freq
        cos, sin = (torch.cat([f, f], -1) for f in (angles.cos(), angles.sin()))
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def _run(self, ids: Tensor, start: int, last: int | bool) -> Tensor:
        positions = torch.arange(start, start + ids.shape[1]).expand(ids.shape)
        output = self.model(
            input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=int(last)
        )
        return output.logits

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
        self.scale = scaling or query.shape[-1] ** -0.5
        if self._cache is None:
            self._recorded.append((query[0], key[0], value[0]))
            out = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scaling, enable_gqa=True
            )
            return out.transpose(1, 2), None
        if self._grown is not None:
            before = self._grown[module.layer_idx]
            key, value = (torch.cat(pair, 2) for pair in zip(before, (key, value), strict=True))
            self._grown[module.layer_idx] = key, value
        cache = self._cache[module.layer_idx]
        return _attend_kept(query, key, value, cache, self.scale, self._most), None


def _gathered(reading: Reading, layer: int, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Kept keys and values `[V, H, B, d]` and which of them are real `[V, H, B]`."""
    counts = kept.sum(-1)
    width = int(counts.max())
    # Kept entries first, in their order.
    order = torch.argsort(kept.to(torch.uint8), dim=-1, descending=True, stable=True)
    index = order[..., :width]
    real = torch.arange(width) < counts[..., None]
    heads = torch.arange(kept.shape[1])[:, None]
    return reading.keys[layer][heads, index], reading.values[layer][heads, index], real


def _attend_kept(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: tuple[Tensor, Tensor, Tensor],
    scale: float,
    most: list[Tensor] | None = None,
) -> Tensor:
    """Attention over the cache and the text itself; `most` takes the largest weights."""
    old_keys, old_values, real = cache
    batch, _, length, size = query.shape
    heads = key.shape[1]
    rows = (query * scale).unflatten(1, (heads, -1)).flatten(2, 3)  # [V, H, G * A, d]
    old = rows @ old_keys.transpose(2, 3)
    old.masked_fill_(~real[:, :, None], float("-inf"))
    new = (rows @ key.transpose(2, 3)).unflatten(2, (-1, length))
    hidden = torch.ones(length, key.shape[2], dtype=torch.bool).triu(key.shape[2] - length + 1)
    new = new.masked_fill(hidden, float("-inf")).flatten(2, 3)
    weights = torch.cat([old, new], -1).softmax(-1)
    width = old.shape[-1]
    if most is not None:
        most.append(weights[0, ..., :width].amax(1))
    out = weights[..., :width] @ old_values + weights[..., width:] @ value
    return out.view(batch, -1, length, size).transpose(1, 2)
