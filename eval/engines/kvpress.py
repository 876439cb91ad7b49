"""NVIDIA's kvpress behind the same questions: its presses on a Hugging Face model.

kvpress and vLLM want different versions of transformers, so this engine runs in an environment of
its own, on the folder of a run that was prepared elsewhere. A press's own code decides what stays.
What it does not decide is kept equal to the other engine: token ids, greedy answers, kept bytes
(rounded up to whole blocks), and when the cache is compressed.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from uncomp.config import UncompConfig
from uncomp.eval.engines.base import Answer, Ask, EngineError, EngineMissing
from uncomp.eval.engines.identity import identity
from uncomp.eval.engines.records import token_record
from uncomp.eval.tasks.teacher_forcing import TokenRecord
from uncomp.plan import Target
from uncomp.request import RequestSettings

#: name of the ``extra`` entry that describes a press, as JSON
PRESS = "kvpress"
#: vLLM's on CPUs. Presses may keep as much as rounding up to whole blocks keeps elsewhere.
BLOCK_SIZE = 32


#: (batch, head, entry) indices of what a layer hides
Hidden = tuple[Tensor, Tensor, Tensor]


@dataclass
class _Cache:
    """What a press has left of a prompt.

    Attributes:
        keys, values: per layer `[1, H, n, d]`.
        masked: per layer, (batch, head, entry) indices that are there but not kept (kvpress hides
            them with made-up keys while decoding), or None.
    """

    keys: list[Tensor]
    values: list[Tensor]
    masked: list[Hidden | None]

    def add(self, keys: Tensor, values: Tensor, masked: Hidden | None) -> None:
        """The next layer; presses that only mask leave everything where it was."""
        if masked is not None:
            keys, values, masked = packed(keys, values, masked)
        self.keys.append(keys)
        self.values.append(values)
        self.masked.append(masked)

    def kept(self) -> int:
        """Entries, summed over layers and KV heads."""
        there = sum(keys.shape[1] * keys.shape[2] for keys in self.keys)
        return there - sum(hidden[0].numel() for hidden in self.masked if hidden is not None)


class KvpressEngine:
    """Answers with the caches that presses leave.

    Args:
        model: folder or hub name.
        max_model_len: tokens of prompt and answer at most, as in the run's other engines.
        revision: of a hub model.
        dtype: of the model, "auto": its checkpoint's.

    Raises:
        EngineError: kvpress is missing, or the model cannot be loaded.
    """

    compresses = True

    def __init__(
        self, model: str, max_model_len: int, revision: str | None = None, dtype: str = "auto"
    ) -> None:
        try:
            import kvpress
        except ImportError as error:
            raise EngineMissing(
                "kvpress is not installed here, and it does not fit beside vLLM: make another "
                "environment, `pip install 'uncomp[kvpress]'` there, and give it this run with "
                "`uncomp eval predict FOLDER`"
            ) from error
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._library: Any = kvpress
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model, revision=revision)
            self._model: Any = AutoModelForCausalLM.from_pretrained(
                model, revision=revision, dtype=dtype, attn_implementation="sdpa"
            ).eval()
        except (OSError, ValueError) as error:
            raise EngineError(f"{model} cannot be loaded: {error}") from error
        self._named, self._revision = model, revision
        self.max_model_len = max_model_len
        found = self._model.generation_config.eos_token_id
        ends = found if isinstance(found, list) else [found]
        self._ends = {*ends, self.tokenizer.eos_token_id} - {None}

    def facts(self) -> dict[str, Any]:
        config = self._model.config
        return {
            "engine": f"Hugging Face transformers with kvpress {version('kvpress')}",
            **identity(self._named, self._revision),
            "architecture": type(self._model).__name__,
            "layers": config.num_hidden_layers,
            "kv_heads": config.num_key_value_heads,
            "query_heads": config.num_attention_heads,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "transformers": version("transformers"),
            "kept_tokens_rounded_up_to": BLOCK_SIZE,
            "max_model_len": self.max_model_len,
        }

    @torch.inference_mode()
    def answer(self, groups: Sequence[Sequence[Ask]]) -> Iterator[Answer]:
        for group in groups:
            # Those that compress at one place share the reading of what comes before it.
            places: dict[int, list[Ask]] = {}
            for ask in group:
                place = int(ask.extra.get("kv_compact_at", 0)) or len(ask.prompt)
                places.setdefault(place, []).append(ask)
            for place, asks in places.items():
                yield from self._answer(asks, place)

    def close(self) -> None:
        del self._model

    def _answer(self, asks: list[Ask], place: int) -> Iterator[Answer]:
        start = time.perf_counter()
        prompt = torch.tensor([list(asks[0].prompt)])
        presses = [self._press(ask, place) for ask in asks]
        together = [i for i, press in enumerate(presses) if self._only_compresses(press)]
        logits, caches = self._read(prompt[:, :place], [presses[i] for i in together])
        found = dict(zip(together, caches, strict=True))
        for i, ask in enumerate(asks):
            if i in found:
                own, cache = logits, found.pop(i)
            else:
                own, cache = self._read_alone(prompt[:, :place], presses[i])
            yield self._say(ask, prompt, place, own, cache, time.perf_counter() - start)

    def _press(self, ask: Ask, place: int) -> Any:
        """The press of a request, None: the full cache."""
        if ask.extra.get("kv_compress") == "false":
            return None
        if PRESS not in ask.extra:
            raise EngineError(f"{ask.key} names no press: only kvpress methods run here")
        press = build(self._library, json.loads(ask.extra[PRESS]))
        kept = kept_tokens(float(ask.extra["kv_keep"]), place)
        # A quarter more, because presses make whole numbers of it, some by rounding down.
        press.compression_ratio = max(0.0, 1 - (kept + 0.25) / place)
        press.post_init_from_model(self._model)
        return press

    def _only_compresses(self, press: Any) -> bool:
        """Whether a press only looks at a finished layer, so that many can share one reading."""
        if press is None:
            return True
        base = self._library.BasePress
        kind = type(press)
        return kind.__call__ is base.__call__ and kind.forward_hook is base.forward_hook

    def _read(self, ids: Tensor, presses: list[Any]) -> tuple[Tensor, list[_Cache]]:
        """Logits after a prompt, and what each press leaves of it."""
        caches = [_Cache([], [], []) for _ in presses]

        def hook(module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            hidden = kwargs["hidden_states"]
            for press, cache in zip(presses, caches, strict=True):
                module.masked_key_indices = None
                keys, values = layer.keys, layer.values
                if press is not None:
                    keys, values = press.compress(module, hidden, keys, values, output[1], kwargs)
                cache.add(keys, values, module.masked_key_indices)
            module.masked_key_indices = None

        with self._hooked(hook):
            output = self._model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1], caches

    def _read_alone(self, ids: Tensor, press: Any) -> tuple[Tensor, _Cache]:
        """The same for a press that reads in a way of its own."""
        from transformers import DynamicCache

        past = DynamicCache()
        layers = self._layers()
        with press(self._model):
            # As in kvpress's pipeline: presses look for these arguments of the inner model.
            hidden = self._model.model(input_ids=ids, past_key_values=past).last_hidden_state
        logits = self._model.lm_head(hidden[:, -1:])[0, -1]
        cache = _Cache([], [], [])
        for layer, held in zip(layers, past.layers, strict=True):
            cache.add(held.keys, held.values, getattr(layer.self_attn, "masked_key_indices", None))
            layer.self_attn.masked_key_indices = None
        return logits, cache

    def _layers(self) -> Any:
        return self._model.model.layers

    @contextmanager
    def _hooked(self, hook: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in self._layers():
                layer.self_attn.rotary_emb = self._model.model.rotary_emb  # presses use it
                handle = layer.self_attn.register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _say(
        self, ask: Ask, prompt: Tensor, place: int, logits: Tensor, cache: _Cache, seconds: float
    ) -> Answer:
        start = time.perf_counter()
        kept = {
            "kept_tokens": cache.kept(),
            "full_tokens": place * sum(keys.shape[1] for keys in cache.keys),
            "compactions": 1,
        }
        decoder = _Decoder(self._model, cache, place)
        if place < prompt.shape[1]:
            logits = decoder.feed(prompt[:, place:])[-1]
        records: tuple[TokenRecord, ...] = ()
        if ask.forced:
            said = list(ask.forced)
            rows = torch.stack([logits])
            if len(said) > 1:
                rows = torch.cat([rows, decoder.feed(torch.tensor([said[:-1]]))])
            records = tuple(_records(rows, said, ask.top_logprobs))
            text, finish = self.tokenizer.decode(said), "length"
        else:
            said, text, finish = self._generate(ask, decoder, logits)
        took = seconds + time.perf_counter() - start
        return Answer(ask.key, text, len(said), finish, took, kept, records)

    def _generate(self, ask: Ask, decoder: _Decoder, logits: Tensor) -> tuple[list[int], str, str]:
        said: list[int] = []
        while True:
            said.append(int(logits.argmax()))
            is_end = said[-1] in self._ends and not ask.ignore_eos
            text = self.tokenizer.decode(said, skip_special_tokens=True)
            found = [at for at in (text.find(stop) for stop in ask.stop) if at >= 0]
            if is_end or found:
                return said, text[: min(found)] if found else text, "stop"
            if len(said) == ask.max_tokens:
                return said, text, "length"
            logits = decoder.feed(torch.tensor([said[-1:]]))[-1]


class _Decoder:
    """Feeds tokens to a model whose cache a press has left.

    Args:
        model: of transformers.
        cache: taken over.
        position: of the next token; caches that lost tokens cannot tell.
    """

    def __init__(self, model: Any, cache: _Cache, position: int) -> None:
        from transformers import DynamicCache

        self._model, self._position = model, position
        self._past = DynamicCache()
        for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
            # A press that only masks writes into the keys while it decodes: not into shared ones.
            own = keys.clone() if cache.masked[layer] is not None else keys
            self._past.update(own, values, layer)
        self._masked = cache.masked

    def feed(self, ids: Tensor) -> Tensor:
        """`[1, n]` token ids -> `[n, vocabulary]` logits after each of them."""
        count = ids.shape[1]
        lengths = {layer.keys.shape[2] for layer in self._past.layers}
        if count > 1 and len(lengths) > 1:
            # One causal mask for all layers would not fit; a single token needs none.
            return torch.cat([self.feed(ids[:, i : i + 1]) for i in range(count)])
        positions = torch.arange(self._position, self._position + count).unsqueeze(0)
        self._position += count
        layers = self._model.model.layers
        for layer, masked in zip(layers, self._masked, strict=True):
            layer.self_attn.masked_key_indices = masked
        try:
            output = self._model(
                input_ids=ids, past_key_values=self._past, position_ids=positions, use_cache=True
            )
        finally:
            for layer in layers:
                layer.self_attn.masked_key_indices = None
        return output.logits[0]


def packed(keys: Tensor, values: Tensor, masked: Hidden) -> tuple[Tensor, Tensor, Hidden | None]:
    """Drop what is hidden in every head; the same attention over fewer entries.

    Args:
        keys, values: `[1, H, n, d]`.
        masked: what is hidden.

    Returns:
        Kept entries of every head in their order, up to the longest head, and what is hidden now:
        the ends of the other heads.
    """
    gone = torch.zeros(keys.shape[1:3], dtype=torch.bool)
    gone[masked[1], masked[2]] = True
    counts = (~gone).sum(-1)
    width = int(counts.max())
    order = torch.argsort(gone.to(torch.uint8), dim=-1, stable=True)[:, :width]
    index = order[None, :, :, None].expand(1, -1, -1, keys.shape[-1])
    head, entry = (torch.arange(width) >= counts[:, None]).nonzero(as_tuple=True)
    rest = (torch.zeros_like(head), head, entry) if len(head) else None
    return keys.gather(2, index), values.gather(2, index), rest


def build(library: Any, described: Mapping[str, Any]) -> Any:
    """A press from its description.

    Args:
        library: the kvpress module.
        described: ``{"class": NAME, argument: value, ...}``; values may be presses.

    Raises:
        EngineError: kvpress has no such press, or it does not take such arguments.
    """
    given = dict(copy.deepcopy(described))
    name = given.pop("class", None)
    kind = getattr(library, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, library.BasePress)):
        presses = sorted(n for n in dir(library) if n.endswith("Press"))
        raise EngineError(f"kvpress has no press {name!r}; there are: {', '.join(presses)}")
    arguments = {
        key: build(library, value) if isinstance(value, Mapping) else value
        for key, value in given.items()
    }
    try:
        return kind(**arguments)
    except (TypeError, AssertionError) as error:
        raise EngineError(f"kvpress's {name} does not take {arguments}: {error}") from error


def kept_tokens(keep: float, tokens: int) -> int:
    """Tokens that a head keeps (mean) at a keep ratio, as many as in the vLLM engine."""
    settings = RequestSettings(compress=True, keep=keep, budget=None)
    target = Target.of(settings, UncompConfig(keep=keep), BLOCK_SIZE)
    full = tokens // BLOCK_SIZE
    if not target.worthwhile(tokens, full):
        return tokens
    return (target.kept_blocks(tokens) - full) * BLOCK_SIZE + tokens


def _records(logits: Tensor, said: Sequence[int], top: int) -> Iterator[TokenRecord]:
    for token, row in zip(said, torch.log_softmax(logits.float(), -1), strict=True):
        best = row.topk(top)
        found = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        found[token] = float(row[token])
        yield token_record(token, found, top)
