"""Prompts that are pruned whole and in chunks, on a small model of random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from uncomp.eval.ablation.chunked import PrunedReader
from uncomp.pruning import CHOICES, Schedule

PROMPT = [(7 * i * i + 3 * i) % 97 for i in range(200)]
SCHEDULE = Schedule((1, 3), 4)
CHOICE = CHOICES["handed-on"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3}
    # Far from the usual 0.02, so that attention is not flat.
    config = LlamaConfig(vocab_size=97, initializer_range=0.4, eos_token_id=96, **shape, **heads)
    LlamaForCausalLM(config).save_pretrained(path)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(97)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reader(folder: Path) -> PrunedReader:
    return PrunedReader(str(folder))


def plain(folder: Path, ids: list[int]) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("chunk", [0, 64, 90])
def test_a_fraction_of_one_is_the_model(reader: PrunedReader, folder: Path, chunk: int) -> None:
    logits = reader.read(PROMPT, SCHEDULE, 1.0, CHOICE, chunk)
    expected = plain(folder, PROMPT)
    torch.testing.assert_close(logits, expected[-1], rtol=0, atol=1e-4)
    answer = reader.generate(logits, 200, 5)
    if answer:
        follow = plain(folder, PROMPT + answer)[199:]
        assert answer == follow.argmax(-1)[: len(answer)].tolist()


@pytest.mark.parametrize(
    ("chunk", "held"),
    [
        # Layers 0, 1 and 2, 3: all, 3/4, half of the tokens.
        (0, [200, 150, 150, 100]),
        # The last 40 are half a chunk, of which 36 always go on.
        (80, [200, 60 + 60 + 36, 60 + 60 + 36, 40 + 40 + 36]),
        # The last 8 join the chunk before.
        (96, [200, 72 + 78, 72 + 78, 48 + 52]),
    ],
    ids=["whole", "three", "two"],
)
def test_layers_hold_what_the_schedule_says(
    reader: PrunedReader, chunk: int, held: list[int]
) -> None:
    reader.read(PROMPT, SCHEDULE, 0.5, CHOICE, chunk)
    assert [sum(map(len, layer.positions)) for layer in reader.held] == held
    assert reader.token_layers() == sum(held)
    for layer in reader.held:
        at = torch.cat(layer.positions)
        assert at.tolist() == sorted(set(at.tolist()))
        assert {0, 1, 2, 3, *range(168, 200)} <= set(at.tolist())


def test_what_stopped_is_not_attended_to(reader: PrunedReader, folder: Path) -> None:
    """Layer by layer the pruned pass is the plain one with the same tokens masked."""
    logits = reader.read(PROMPT, SCHEDULE, 0.5, CHOICE)
    whole = plain(folder, PROMPT)[-1]
    assert float((logits - whole).abs().max()) > 1e-2
    kept = [torch.cat(layer.positions) for layer in reader.held]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    masks = []
    for at in kept:
        there = torch.zeros(200, dtype=torch.bool)
        there[at] = True
        seen = torch.ones(200, 200, dtype=torch.bool).tril() & there
        # Rows that stopped are of no interest, but must see something.
        seen |= torch.eye(200, dtype=torch.bool)
        masks.append(torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None])
    with torch.inference_mode():
        inner = model.model
        hidden = inner.embed_tokens(torch.tensor([PROMPT]))
        place = torch.arange(200)[None]
        for layer, mask in zip(inner.layers, masks, strict=True):
            out = layer(
                hidden,
                attention_mask=mask,
                position_ids=place,
                position_embeddings=inner.rotary_emb(hidden, place),
            )
            hidden = out[0] if isinstance(out, tuple) else out
        expected = model.lm_head(inner.norm(hidden[:, -1]))[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
