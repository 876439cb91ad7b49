"""Convert a GGUF file to a Hugging Face checkpoint directory: llama architecture, SmolLM tokenizer.

Transformers can read GGUF too, but drops the SmolLM pre-tokenizer: digits after whitespace then get
other token ids than in training. Nothing here imports transformers.

Layout of the input (llama.cpp): tensors `blk.<i>.<kind>.weight`, where the rows of q and k are
reordered per head, from halves (x1..., x2...) to pairs (x1, x2, ...), for its form of RoPE.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
}
CONTROL, USER_DEFINED = 3, 4  # GGUF token types


def convert(source: Path, target: Path, progress: bool = True) -> None:
    """Write the model in the GGUF file `source` as a bfloat16 checkpoint into `target`.

    Args:
        source: a GGUF file.
        target: a directory; made if it is missing, files in it are overwritten.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: the file holds another architecture or tokenizer than this module knows.
    """
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    _check_supported(fields, source)
    target.mkdir(parents=True, exist_ok=True)
    config = model_config(fields, tied=all(t.name != "output.weight" for t in reader.tensors))
    tensors = tqdm(reader.tensors, desc="converting", unit="tensor", disable=not progress)
    save_file(_state_dict(tensors, config), target / "model.safetensors", {"format": "pt"})
    _write_json(target / "config.json", config)
    token_ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(target / "generation_config.json", token_ids)
    build_tokenizer(fields).save(str(target / "tokenizer.json"))
    _write_json(target / "tokenizer_config.json", tokenizer_config(fields))


def _check_supported(fields: dict[str, Any], source: Path) -> None:
    supported = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "llama.rope.scaling.type": None,
    }
    for name, value in supported.items():
        if fields.get(name) != value:
            raise ValueError(
                f"{source}: {name} is {fields.get(name)!r}, only {value!r} can be converted; "
                "pass a Hugging Face checkpoint of this model instead"
            )


def model_config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Return config.json of a LlamaForCausalLM; `tied`: the output matrix is the embedding."""
    heads = fields["llama.attention.head_count"]
    hidden = fields["llama.embedding_length"]
    theta = float(fields.get("llama.rope.freq_base", 10000.0))
    eos = fields["tokenizer.ggml.eos_token_id"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields.get("llama.rope.dimension_count", hidden // heads),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": fields["llama.context_length"],
        # stored as float32: 1e-5 reads back as 9.999999747e-06
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.3g}"),
        "rope_theta": theta,  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},  # transformers 5
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": eos,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id", eos),
    }


def _state_dict(tensors: Iterable[Any], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    return dict(_convert_tensor(tensor, config) for tensor in tensors)


def _convert_tensor(tensor: Any, config: dict[str, Any]) -> tuple[str, torch.Tensor]:
    name = tensor.name.removesuffix(".weight")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    if name in TENSOR_NAMES:
        new_name = TENSOR_NAMES[name]
    else:
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", name)
        if match is None or match[2] not in LAYER_TENSOR_NAMES:
            raise ValueError(f"tensor {tensor.name!r} is not part of a llama model")
        layer, kind = match.groups()
        new_name = f"model.layers.{layer}.{LAYER_TENSOR_NAMES[kind]}"
        if kind in heads:
            weight = _pairs_to_halves(weight, heads[kind])
    return f"{new_name}.weight", torch.from_numpy(np.array(weight)).to(torch.bfloat16)


def _pairs_to_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows [heads * d, hidden] of each head from RoPE pairs to RoPE halves."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def build_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Return the byte-level BPE tokenizer: every digit by itself, then the GPT-2 split."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    added = [(AddedToken(t, normalized=False), k) for t, k in zip(tokens, kinds, strict=True)]
    tokenizer.add_special_tokens([token for token, kind in added if kind == CONTROL])
    tokenizer.add_tokens([token for token, kind in added if kind == USER_DEFINED])
    return tokenizer


def tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json, the chat template included."""
    tokens = fields["tokenizer.ggml.tokens"]
    named = {role: tokens[fields[key]] for role, key in SPECIAL_TOKENS.items() if key in fields}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        # otherwise transformers 4 adds token_type_ids, which generate() refuses
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    return named | settings


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
