"""The engine for kvpress's presses, with a library of the test's own and a random model.

kvpress itself does not fit beside vLLM. What is tested is what surrounds a press: that the caches
it leaves are used as they are, at the right positions, in answers and likelihoods.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from uncomp.eval.engines.base import Answer, Ask, EngineError, EngineMissing
from uncomp.eval.engines.kvpress import BLOCK_SIZE, KvpressEngine, build, kept_tokens, packed

WORDS = 96


class BasePress:
    """The interface of kvpress's."""

    compression_ratio = 0.0

    def post_init_from_model(self, model: Any) -> None:
        pass

    def compress(
        self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, attention: Any, kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward_hook(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        hidden = kwargs["hidden_states"]
        layer.keys, layer.values = self.compress(
            module, hidden, layer.keys, layer.values, output[1], kwargs
        )
        return output

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        hooks = [
            layer.self_attn.register_forward_hook(self.forward_hook, with_kwargs=True)
            for layer in model.model.layers
        ]
        yield
        for hook in hooks:
            hook.remove()


@dataclass
class EndsPress(BasePress):
    """Keeps the first `front` and then the last entries."""

    front: int = 4
    compression_ratio: float = 0.0

    def compress(self, module, hidden, keys, values, attention, kwargs):  # type: ignore[no-untyped-def]
        kept = torch.tensor(_ends(keys.shape[2], self.compression_ratio, self.front))
        return keys[:, :, kept], values[:, :, kept]


class AlonePress(EndsPress):
    """The same, but reads in its own way, so that it cannot share a pass."""

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        with super().__call__(model):
            yield


class PyramidPress(EndsPress):
    """Keeps fewer in higher layers."""

    def compress(self, module, hidden, keys, values, attention, kwargs):  # type: ignore[no-untyped-def]
        less = 1 - (1 - self.compression_ratio) / (1 + module.layer_idx)
        kept = torch.tensor(_ends(keys.shape[2], less, self.front))
        return keys[:, :, kept], values[:, :, kept]


@dataclass
class MaskingPress(BasePress):
    """Says what is hidden and moves nothing, as Ada-KV does there."""

    press: EndsPress
    compression_ratio: float = 0.0

    def compress(self, module, hidden, keys, values, attention, kwargs):  # type: ignore[no-untyped-def]
        count = keys.shape[2]
        kept = _ends(count, self.compression_ratio, self.press.front)
        gone = torch.tensor([i for i in range(count) if i not in kept])
        module.masked_key_indices = (torch.zeros_like(gone), torch.ones_like(gone), gone)
        return keys, values


def _ends(count: int, ratio: float, front: int) -> list[int]:
    kept = int(count * (1 - ratio))
    return [*range(front), *range(count - kept + front, count)]


@pytest.fixture(scope="module")
def library() -> ModuleType:
    module = ModuleType("kvpress")
    for kind in (BasePress, EndsPress, AlonePress, PyramidPress, MaskingPress):
        setattr(module, kind.__name__, kind)
    return module


@pytest.fixture(scope="module")
def engine(
    library: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KvpressEngine]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,  # logits that differ
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "kvpress", library)
        patch.setattr("uncomp.eval.engines.kvpress.version", lambda name: "0")
        yield KvpressEngine(str(folder), 512, dtype="float32")


def ask(count: int, keep: float | None, press: Any = None, **others: Any) -> Ask:
    rng = random.Random(count)
    extra: dict[str, Any] = {"kv_compress": "false"}
    if keep is not None:
        extra = {"kv_keep": keep, "kvpress": json.dumps(press)}
    extra |= others.pop("extra", {})
    prompt = [rng.randrange(2, WORDS) for _ in range(count)]
    return Ask("k", prompt, others.pop("max_tokens", 6), extra, **others)


def answered(engine: KvpressEngine, *asks: Ask) -> list[Answer]:
    return list(engine.answer([asks]))


def reference(
    engine: KvpressEngine, prompt: list[int], said: list[int], place: int, kept: list[int]
) -> Tensor:
    """`[len(said), WORDS]` logits before each token said, dropped entries masked."""
    ids = torch.tensor([[*prompt, *said[:-1]]])
    count = ids.shape[1]
    row, column = torch.arange(count)[:, None], torch.arange(count)
    gone = torch.ones(count, dtype=torch.bool)
    gone[kept] = False
    gone[place:] = False
    seen = (column <= row) & ~((row >= place) & gone)
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        logits = engine._model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
    return logits[len(prompt) - 1 :]


PRESS = {"class": "EndsPress", "front": 7}


@pytest.mark.parametrize("kind", ["EndsPress", "AlonePress"])
@pytest.mark.parametrize("place", [None, 290], ids=["after-prompt", "before-question"])
def test_answers_are_those_of_the_masked_reference(
    engine: KvpressEngine, kind: str, place: int | None
) -> None:
    extra = {} if place is None else {"kv_compact_at": place}
    question = ask(331, 0.5, {**PRESS, "class": kind}, extra=extra, ignore_eos=True)
    (answer,) = answered(engine, question)
    at = place or 331
    said = [int(word[1:]) for word in answer.text.split()]
    kept = _ends(at, 1 - kept_tokens(0.5, at) / at - 1e-9, 7)
    assert len(kept) == kept_tokens(0.5, at) < at
    expected = reference(engine, list(question.prompt), said, at, kept)
    # Each of its greedy choices is the reference's; random logits are far further apart than 1e-4.
    best = expected.topk(2).values
    assert float((best[:, 0] - best[:, 1]).min()) > 1e-3
    assert said == expected.argmax(-1).tolist()
    # The first token after a whole prompt has seen all of it.
    assert answer.kept == {"kept_tokens": len(kept) * 6, "full_tokens": at * 6, "compactions": 1}
    full = reference(engine, list(question.prompt), said, at, list(range(at)))
    assert float((full - expected).abs().max()) > 0.1  # dropping changes something here


def test_the_full_cache_answers_as_the_model_generates(engine: KvpressEngine) -> None:
    question = ask(57, None, max_tokens=12)
    (answer,) = answered(engine, question)
    prompt = torch.tensor([list(question.prompt)])
    said = engine._model.generate(prompt, max_new_tokens=12, do_sample=False)[0, 57:].tolist()
    assert answer.text == " ".join(f"w{i}" for i in said if i != 1)
    assert answer.kept is not None
    assert answer.kept["kept_tokens"] == answer.kept["full_tokens"]


def test_likelihoods_are_those_of_the_masked_reference(engine: KvpressEngine) -> None:
    forced = (5, 17, 1, 40)
    question = ask(340, 0.25, PRESS, forced=forced, top_logprobs=5)
    (answer,) = answered(engine, question)
    kept = _ends(340, 1 - kept_tokens(0.25, 340) / 340 - 1e-9, 7)
    logits = reference(engine, list(question.prompt), list(forced), 340, kept)
    expected = torch.log_softmax(logits, -1)
    for i, record in enumerate(answer.records):
        # float32 sums in another order
        assert record.forced == pytest.approx(float(expected[i, forced[i]]), abs=1e-4)
        best = expected[i].topk(5)
        assert set(record.top_ids) == set(best.indices.tolist())
    assert len(answer.records) == 4


def test_layers_may_keep_different_numbers(engine: KvpressEngine) -> None:
    """As likelihood and as answer: a text fed at once is a text fed token by token."""
    press = {"class": "PyramidPress", "front": 3}
    (spoken,) = answered(engine, ask(300, 0.5, press, max_tokens=5, ignore_eos=True))
    said = tuple(int(word[1:]) for word in spoken.text.split())
    (forced,) = answered(engine, ask(300, 0.5, press, forced=said, top_logprobs=3))
    assert [record.top_ids[0] for record in forced.records] == list(said)
    assert spoken.kept is not None
    kept = kept_tokens(0.5, 300)
    assert spoken.kept["kept_tokens"] == 2 * (kept + kept // 2 + kept // 3)


def test_requests_share_a_reading_without_disturbing_each_other(engine: KvpressEngine) -> None:
    asks = [
        ask(296, None, ignore_eos=True),
        ask(296, 0.5, PRESS, ignore_eos=True),
        ask(296, 0.5, {"class": "AlonePress"}, ignore_eos=True),
        ask(296, 0.34, {"class": "EndsPress", "front": 1}, ignore_eos=True),
    ]
    alone = [answered(engine, one)[0].text for one in asks]
    assert [one.text for one in answered(engine, *asks)] == alone
    assert len(set(alone)) > 1


def test_hidden_entries_are_not_counted_as_kept(engine: KvpressEngine) -> None:
    press = {"class": "MaskingPress", "press": {"class": "EndsPress"}}
    (answer,) = answered(engine, ask(384, 0.5, press))
    # One of the two heads of each of the three layers has lost half.
    assert answer.kept == {
        "kept_tokens": 3 * (384 + 192), "full_tokens": 3 * 2 * 384, "compactions": 1
    }  # fmt: skip


@pytest.mark.parametrize("equal", [False, True], ids=["ragged", "equal"])
def test_packing_keeps_what_is_not_hidden(equal: bool) -> None:
    torch.manual_seed(1)
    keys, values = torch.randn(2, 1, 3, 40, 5)
    gone = torch.rand(3, 40) < torch.tensor([0.2, 0.5, 0.9])[:, None]
    if equal:
        gone = (torch.arange(40) % 2 == 0).expand(3, -1)
    head, entry = gone.nonzero(as_tuple=True)
    new_keys, new_values, hidden = packed(keys, values, (torch.zeros_like(head), head, entry))
    assert (hidden is None) == equal
    for h in range(3):
        there = torch.ones(new_keys.shape[2], dtype=torch.bool)
        if hidden is not None:
            there[hidden[2][hidden[1] == h]] = False
        assert torch.equal(new_keys[0, h, there], keys[0, h, ~gone[h]])
        assert torch.equal(new_values[0, h, there], values[0, h, ~gone[h]])
    assert new_keys.shape[2] == int((~gone).sum(-1).max())


def test_stop_strings_end_an_answer(engine: KvpressEngine) -> None:
    (whole,) = answered(engine, ask(280, 0.5, PRESS, max_tokens=8, ignore_eos=True))
    words = whole.text.split()
    (answer,) = answered(
        engine, ask(280, 0.5, PRESS, max_tokens=8, ignore_eos=True, stop=(f" {words[3]}",))
    )
    assert answer.finish == "stop"
    assert answer.text == " ".join(words[: words.index(words[3])])


def test_kept_bytes_are_those_of_the_other_engine() -> None:
    rng = random.Random(1)
    for _ in range(200):
        tokens, keep = rng.randrange(40, 9000), rng.choice([0.5, 0.25, 0.125, 0.0625, 0.33])
        kept = kept_tokens(keep, tokens)
        tail = tokens % BLOCK_SIZE
        assert kept == tokens or (kept - tail) % BLOCK_SIZE == 0
        if tokens > 2000:
            assert keep * tokens <= kept < keep * tokens + 2 * BLOCK_SIZE


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"class": "NoPress"}, "no press 'NoPress'; there are: AlonePress, "),
        ({}, "no press None"),
        ({"class": "EndsPress", "size": 3}, "EndsPress does not take {'size': 3}"),
    ],
    ids=["unknown", "nameless", "argument"],
)
def test_bad_presses_are_refused(library: ModuleType, described: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        build(library, described)


def test_nested_presses_are_built(library: ModuleType) -> None:
    made = build(library, {"class": "MaskingPress", "press": {"class": "EndsPress", "front": 9}})
    assert made.press.front == 9


def test_other_methods_are_refused(engine: KvpressEngine) -> None:
    question = Ask("k", [2, 3, 4], 2, {"kv_keep": 0.5, "kv_policy": "adakv"})
    with pytest.raises(EngineError, match="names no press"):
        answered(engine, question)


def test_without_kvpress_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(EngineMissing, match="uncomp eval predict FOLDER"):
        KvpressEngine("anything", 64)
