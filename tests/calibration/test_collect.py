"""Collected entropies equal a direct computation from the model's own projections."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from uncomp.calibration.collect import calibrate, load_model, sample_entropies
from uncomp.calibration.file import CalibrationError, load
from uncomp.calibration.plan import plan_heads
from uncomp.calibration.second_reading import REQUEST, measure_importance
from uncomp.calibration.text import Text
from uncomp.cli import calibrate as calibrate_command
from uncomp.cli import inspect as inspect_command
from uncomp.config import MEASURES, SOURCES
from uncomp.importance import KEEPS

LAYERS, HEADS, KV_HEADS, HEAD_DIM, TOKENS = 3, 6, 2, 8, 96
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TEXTS = [Text("letters", "the quick brown fox jumps over a lazy dog " * 80)]


def tokenizer(text: str, **kwargs: Any) -> dict[str, list[int]]:
    return {"input_ids": [ord(letter) % 64 for letter in text]}


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    # The default initialisation is so small that all heads look isotropic.
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3)).eval()


@pytest.fixture
def ids() -> list[int]:
    return torch.randint(3, 64, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()


def entropies(x: torch.Tensor, k: int, unit_norm: bool) -> list[float]:
    """raw, renormalized, full of one head x [tokens, d], straight from the definition."""
    x = x.double() - x.double().mean(dim=0)
    if unit_norm:
        x = x / x.norm(dim=1, keepdim=True)
    values = torch.linalg.svdvals(x).square()
    values = values / values.sum()
    top = values[:k] / values[:k].sum()
    terms = [values[:k], top, values]
    log_d = torch.log(torch.tensor(float(x.shape[1])))
    return [float(-(t * t.log()).sum() / log_d) for t in terms]


def projections(model: LlamaForCausalLM, ids: list[int]) -> list[dict[str, torch.Tensor]]:
    """Per layer queries [heads, tokens, d] and keys, from hooks on the projections, then RoPE."""
    seen: dict[tuple[int, str], torch.Tensor] = {}
    handles = []
    for index, layer in enumerate(model.model.layers):
        for source, module in (
            ("queries", layer.self_attn.q_proj),
            ("keys", layer.self_attn.k_proj),
        ):
            key = (index, source)
            handles.append(
                module.register_forward_hook(
                    lambda _m, _in, out, key=key: seen.__setitem__(key, out)
                )
            )
    with torch.inference_mode():
        model(torch.tensor([ids]), use_cache=False)
        cos, sin = model.model.rotary_emb(seen[0, "keys"], torch.arange(len(ids))[None])
        for handle in handles:
            handle.remove()
        result = []
        for layer in range(LAYERS):
            q, k = (
                seen[layer, source].view(1, len(ids), -1, HEAD_DIM).transpose(1, 2)
                for source in ("queries", "keys")
            )
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            result.append({"queries": q[0], "keys": k[0]})
    return result


@pytest.mark.parametrize("unit_norm", [True, False], ids=["unit norm", "centred"])
def test_equals_direct_computation(
    model: LlamaForCausalLM, ids: list[int], unit_norm: bool
) -> None:
    k = 3
    collected = sample_entropies(model, ids, k, unit_norm)
    assert collected.shape == (len(SOURCES), len(MEASURES), LAYERS, KV_HEADS)
    expected = torch.empty_like(collected)
    for layer, by_source in enumerate(projections(model, ids)):
        for source, name in enumerate(SOURCES):
            heads = torch.tensor([entropies(x, k, unit_norm) for x in by_source[name]])
            # Query head i belongs to KV head i // G; for keys G is 1.
            expected[source, :, layer] = heads.T.reshape(len(MEASURES), KV_HEADS, -1).mean(dim=2)
    order = [("raw", "renormalized", "full").index(measure) for measure in MEASURES]
    torch.testing.assert_close(collected, expected[:, order], atol=1e-5, rtol=0)
    # A permuted layer or head must not pass.
    assert collected[:, 0].std() > 1e-3


@pytest.mark.parametrize("longest", [None, 150], ids=["roomy", "short"])
def test_importance_equals_direct_computation(
    model: LlamaForCausalLM, ids: list[int], longest: int | None
) -> None:
    """What queries of the second reading attend to most, ranked over all heads of all layers."""
    found = measure_importance(model, tokenizer, [ids, ids[::-1]], longest)
    request = tokenizer(REQUEST)["input_ids"]
    tokens = TOKENS if longest is None else (longest - len(request)) // 2
    assert (found["samples"], found["tokens"], found["keeps"]) == (2, tokens, list(KEEPS))
    expected = torch.zeros(len(KEEPS), LAYERS, KV_HEADS, dtype=torch.float64)
    for text in (ids[:tokens], ids[::-1][:tokens]):
        scores = []
        for layer in projections(model, [*text, *request, *text]):
            keys = layer["keys"].repeat_interleave(HEADS // KV_HEADS, 0)
            logits = layer["queries"] @ keys.transpose(1, 2) / HEAD_DIM**0.5
            future = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
            weights = logits.masked_fill(future, float("-inf")).softmax(-1)
            most = weights[:, tokens:, :tokens].amax(1)
            scores.append(most.view(KV_HEADS, -1, tokens).amax(1))
        ranked = torch.stack(scores).flatten().sort(descending=True).values
        for i, keep in enumerate(KEEPS):
            least = ranked[max(1, round(keep * len(ranked))) - 1]
            expected[i] += (torch.stack(scores) >= least).double().mean(-1) / 2
    # An entry at the border may fall on either side: sums are in another order.
    torch.testing.assert_close(
        torch.tensor(found["shares"], dtype=torch.float64), expected, atol=0.6 / tokens, rtol=0
    )
    assert expected[2].std() > 2 * 0.6 / tokens  # exchanged heads would not pass


def test_models_too_short_to_read_twice_are_refused(
    model: LlamaForCausalLM, ids: list[int]
) -> None:
    with pytest.raises(CalibrationError, match="30 positions, too few to read a text twice"):
        measure_importance(model, tokenizer, [ids], 30)


def test_model_is_left_as_it_was(model: LlamaForCausalLM, ids: list[int]) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = model.config._attn_implementation, set(ALL_ATTENTION_FUNCTIONS)
    sample_entropies(model, ids, 2)
    assert (model.config._attn_implementation, set(ALL_ATTENTION_FUNCTIONS)) == before


def test_soft_cap_is_respected(ids: list[int]) -> None:
    """sdpa ignores the soft cap, so a model that has one must be collected with eager attention."""
    found = {}
    for softcap in (0.5, None):
        torch.manual_seed(0)
        config = Gemma2Config(
            **SIZES, initializer_range=0.3, attn_logit_softcapping=softcap,
            query_pre_attn_scalar=HEAD_DIM,
        )  # fmt: skip
        found[softcap] = sample_entropies(Gemma2ForCausalLM(config).eval(), ids, 2)
    # The first layer's queries and keys come before any attention.
    torch.testing.assert_close(found[0.5][:, :, 0], found[None][:, :, 0])
    assert (found[0.5][:, :, 1:] - found[None][:, :, 1:]).abs().max() > 1e-4


def test_attention_outside_the_interface_is_refused(
    model: LlamaForCausalLM, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = model.model.layers[1].self_attn
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(CalibrationError, match=r"layers \[1\] does not go through"):
        sample_entropies(model, ids, 2)


def test_calibration_is_decided_by_the_seed(model: LlamaForCausalLM) -> None:
    first, again, other = (
        calibrate(model, tokenizer, "tiny", TEXTS, samples=2, tokens=TOKENS, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first.entropy == again.entropy
    assert first.importance == again.importance
    assert first.entropy != other.entropy
    assert first.truncation == HEAD_DIM // 4
    first.check_model(model.config)


def test_mean_and_spread_over_samples(model: LlamaForCausalLM) -> None:
    seen: list[list[int]] = []

    def watch(samples: Any) -> Any:
        seen.extend(samples)
        return samples

    made = calibrate(
        model, tokenizer, "tiny", TEXTS, samples=3, tokens=TOKENS, truncation=3, progress=watch
    )
    values = torch.stack([sample_entropies(model, ids, 3) for ids in seen])
    for s, source in enumerate(SOURCES):
        for m, measure in enumerate(MEASURES):
            table = made.entropy[source][measure]
            mean, std = values[:, s, m].mean(dim=0), values[:, s, m].std(dim=0, correction=0)
            torch.testing.assert_close(made.scores(source, measure), mean, atol=1e-6, rtol=0)
            torch.testing.assert_close(
                torch.tensor(table["std"], dtype=torch.float64), std, atol=1e-6, rtol=0
            )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"tokens": 1}, "tokens is 1"),
        ({"tokens": 1024}, "between 2 and the model's 512"),
        ({"truncation": 9}, "between 1 and head_dim = 8"),
        ({"truncation": 0}, "truncation is 0"),
    ],
    ids=["no samples", "one token", "too long", "k above d", "k is zero"],
)
def test_bad_settings(model: LlamaForCausalLM, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibrate(model, tokenizer, "tiny", TEXTS, **{"tokens": TOKENS, **settings})


def test_unknown_model(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no model at .*config\.json"):
        load_model(str(tmp_path / "missing"), "cpu")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CalibrationError, match="cannot load model"):
        load_model(str(tmp_path), "cpu")


def test_unusable_device(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="device 'abacus' is not usable"):
        load_model(str(tmp_path), "abacus")


def test_output_is_checked_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    output = str(tmp_path / "missing" / "file.json")
    assert run(calibrate_command, "calibrate", "tiny", "-o", output) == 1
    assert "existing folder" in capsys.readouterr().err


def test_plan_keeps_the_ratio(model: LlamaForCausalLM) -> None:
    made = calibrate(model, tokenizer, "tiny", TEXTS, samples=1, tokens=TOKENS)
    plan = plan_heads(
        made, source="keys", measure="full", groups=8, ratio=3.0, keep=0.25, tokens=4096,
        block_size=16,
    )  # fmt: skip
    assert [sorted(row) for row in plan.groups] == [[0, 1]] * LAYERS
    assert [sorted(row) for row in plan.tokens] == [[512, 1536]] * LAYERS
    for entropy, tokens in zip(plan.entropy, plan.tokens, strict=True):
        assert tokens.index(1536) == entropy.index(max(entropy))


def run(command: Any, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(arguments)
    return args.run(args)


def test_commands(
    model: LlamaForCausalLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(
        "uncomp.calibration.collect.load_model", lambda name, device: (model, tokenizer)
    )
    text, file, png = (tmp_path / name for name in ("text.txt", "tiny.json", "tiny.png"))
    text.write_text(TEXTS[0].content)
    assert run(
        calibrate_command, "calibrate", "tiny", "-o", str(file), "--text", str(text),
        "--samples", "2", "--tokens", "64", "--no-unit-norm", "--device", "cpu",
    ) == 0  # fmt: skip
    captured = capsys.readouterr()
    assert json.loads(captured.out)["unit_norm"] is False
    assert "unreliable" in captured.err
    assert load(file).text[0]["name"] == "text.txt"

    assert run(inspect_command, "inspect", str(file), "--png", str(png), "--groups", "2") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["kept_tokens"]
    assert "KV head 1" in captured.err
    assert png.stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["absent.json"], "cannot read calibration file"),
        (["FILE", "--keep", "0"], "keep 0.0 must be"),
        (["FILE", "--groups", "0"], "groups must be at least 1"),
        (["FILE", "--ratio", "0.5"], "ratio"),
    ],
    ids=["no file", "keep", "groups", "ratio"],
)
def test_inspect_refuses(
    model: LlamaForCausalLM,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    file = tmp_path / "tiny.json"
    calibrate(model, tokenizer, "tiny", TEXTS, samples=1, tokens=64).save(file)
    arguments = [str(file) if option == "FILE" else option for option in options]
    assert run(inspect_command, "inspect", *arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out
