"""Head entropies of a Hugging Face model on real text.

One forward pass per sample, without KV cache and without the output layer. Queries and keys are
seen inside the attention call of each layer, after RoPE, and reduced to a few numbers per head
before the next layer runs; so the memory needed beyond the weights is that of one layer.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import torch

from uncomp.calibration.file import (
    DECIMALS,
    Calibration,
    CalibrationError,
    Entropies,
    identity_hash,
    model_identity,
)
from uncomp.calibration.recording import read
from uncomp.calibration.second_reading import measure_importance
from uncomp.calibration.text import Text, windows
from uncomp.config import MEASURES, SOURCES
from uncomp.kernels.entropy import Measure, default_truncation, spectrum, truncated_entropy
from uncomp.kernels.gram import gram, unit_norm_covariance

# Heads whose statistics are computed at once: bounds the fp64 copy of the queries.
HEADS_AT_ONCE = 8


def entropies_of(x: torch.Tensor, truncation: int, unit_norm: bool) -> torch.Tensor:
    """Entropies of each head's token matrix.

    Args:
        x: [heads, tokens, head_dim] queries or keys after RoPE, any float type.
        truncation: number of leading eigenvalues k that raw and renormalized use.
        unit_norm: centre and scale each token to unit length (the official form), else only centre.

    Returns:
        [measures, heads] float64 on the CPU, in the order of MEASURES, normalised by ln(head_dim).
    """
    parts = []
    for heads in x.split(HEADS_AT_ONCE):
        heads = heads.double()
        lengths = torch.full((heads.shape[0],), heads.shape[1], device=heads.device)
        if unit_norm:
            covariance = unit_norm_covariance(heads, lengths)
        else:
            covariance = gram(heads, lengths).covariance()
        # The matrices are small: LAPACK on the CPU is fast enough and the same on every machine.
        eigenvalues = spectrum(covariance.cpu())
        measures = [cast(Measure, name) for name in MEASURES]
        parts.append(
            torch.stack([truncated_entropy(eigenvalues, truncation, name) for name in measures])
        )
    return torch.cat(parts, dim=1)


@dataclass
class _Entropies:
    """Entropies of one sample: layer -> [sources, measures, KV heads]."""

    tokens: int
    truncation: int
    unit_norm: bool
    layers: dict[int, torch.Tensor] = field(default_factory=dict)

    def record(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float, softcap: float
    ) -> None:
        if layer in self.layers:
            raise CalibrationError(f"layer {layer} attends twice in one pass: not supported")
        if query.shape[2] != self.tokens or key.shape[2] != self.tokens:
            raise CalibrationError(
                f"layer {layer} attends with {query.shape[2]} queries and {key.shape[2]} keys, "
                f"expected {self.tokens} of both: the model is not a plain causal decoder"
            )
        heads = key.shape[1]
        of_queries = entropies_of(query[0], self.truncation, self.unit_norm)
        of_queries = of_queries.reshape(len(MEASURES), heads, -1).mean(dim=-1)
        of_keys = entropies_of(key[0], self.truncation, self.unit_norm)
        by_source = {"queries": of_queries, "keys": of_keys}
        self.layers[layer] = torch.stack([by_source[source] for source in SOURCES])


@torch.inference_mode()
def sample_entropies(
    model: Any, ids: Sequence[int], truncation: int, unit_norm: bool = True
) -> torch.Tensor:
    """Entropies of all heads on one token sequence.

    Args:
        model: a transformers causal LM whose attention goes through AttentionInterface.
        ids: token ids of one sample.
        truncation, unit_norm: see `entropies_of`.

    Returns:
        [sources, measures, layers, KV heads] float64, in the order of SOURCES and MEASURES.

    Raises:
        CalibrationError: some layer's attention was not seen, or has other heads than configured.
    """
    recorder = _Entropies(len(ids), truncation, unit_norm)
    read(model, ids, recorder)
    identity = model_identity(model.config)
    unseen = sorted(set(range(identity["num_layers"])) - recorder.layers.keys())
    if unseen:
        raise CalibrationError(
            f"{type(model).__name__}: the attention of layers {unseen} does not go through "
            "transformers' AttentionInterface (old model code, or layers without attention); "
            "such a model cannot be calibrated"
        )
    heads = {layer: values.shape[-1] for layer, values in recorder.layers.items()}
    if set(heads.values()) != {identity["num_kv_heads"]}:
        raise CalibrationError(
            f"{type(model).__name__}: KV heads per layer are {heads}, the configuration says "
            f"{identity['num_kv_heads']} for every layer; such a model cannot be calibrated"
        )
    return torch.stack([recorder.layers[layer] for layer in sorted(recorder.layers)], dim=2)


def load_model(name: str, device: str) -> tuple[Any, Any]:
    """Load (model in bfloat16 on `device`, tokenizer) from a folder or a Hugging Face id.

    Raises:
        CalibrationError: transformers is missing, or `name` or `device` cannot be used.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise CalibrationError(
            f"calibration needs transformers ({error}): pip install 'uncomp[calibrate]'"
        ) from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).splitlines()[0]
        raise CalibrationError(f"device {device!r} is not usable: {reason}") from error
    looks_local = name.startswith((".", "/", "~")) or Path(name).exists()
    if looks_local and not (Path(name) / "config.json").is_file():
        raise CalibrationError(
            f"no model at {name}: expected a folder with config.json, weights and a tokenizer"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CalibrationError(
            f"cannot load model {name!r}: {reason} "
            "(give a folder with config.json, weights and a tokenizer, or a Hugging Face id)"
        ) from error
    return model.to(device).eval(), tokenizer


def calibrate(
    model: Any,
    tokenizer: Any,
    name: str,
    texts: Sequence[Text],
    *,
    samples: int = 16,
    tokens: int = 2048,
    seed: int = 0,
    unit_norm: bool = True,
    truncation: int | None = None,
    progress: Callable[[Iterable[list[int]]], Iterable[list[int]]] = iter,
) -> Calibration:
    """Calibrate a loaded model on random windows of `texts`.

    Args:
        model, tokenizer: as `load_model` returns them.
        name: what the file calls the model; of a folder only the last part is kept.
        texts: the texts take turns, see `windows`.
        samples, tokens: number of windows and tokens in each.
        seed: decides the windows; the same seed and texts give the same file.
        unit_norm, truncation: see `entropies_of`; truncation None is head_dim // 4.
        progress: wraps the iteration over samples, e.g. a tqdm bar.

    Raises:
        CalibrationError: arguments, texts or model that cannot be used.
    """
    identity = model_identity(model.config)
    head_dim = identity["head_dim"]
    k = default_truncation(head_dim) if truncation is None else truncation
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if samples < 1:
        raise CalibrationError(f"samples is {samples}, must be at least 1")
    if not 2 <= tokens <= (longest or tokens):
        raise CalibrationError(
            f"tokens is {tokens}, must be between 2 and the model's {longest} positions"
        )
    if not 1 <= k <= head_dim:
        raise CalibrationError(f"truncation is {k}, must be between 1 and head_dim = {head_dim}")

    def tokenize(text: str) -> list[int]:
        # The tokenizer warns about texts longer than the model; they are cut afterwards.
        return tokenizer(text, verbose=False)["input_ids"]

    chosen = list(windows(texts, tokenize, samples, tokens, seed))
    values = torch.stack([sample_entropies(model, ids, k, unit_norm) for ids in progress(chosen)])
    importance = measure_importance(model, tokenizer, chosen, longest, progress)
    return Calibration(
        model=Path(name).name if Path(name).exists() else name,
        identity=identity,
        config_hash=identity_hash(identity),
        num_layers=identity["num_layers"],
        num_query_heads=identity["num_query_heads"],
        num_kv_heads=identity["num_kv_heads"],
        head_dim=head_dim,
        truncation=k,
        unit_norm=unit_norm,
        samples=samples,
        tokens_per_sample=tokens,
        seed=seed,
        text=[text.record() for text in texts],
        versions=_versions(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        entropy=_summary(values),
        importance=importance,
    )


def _summary(values: torch.Tensor) -> Entropies:
    """values [samples, sources, measures, layers, KV heads] -> the tables of the file."""
    # Rounding noise of a rank-one head may lie below 0.
    mean, std = values.mean(dim=0).clamp(min=0), values.std(dim=0, correction=0)

    def table(x: torch.Tensor) -> list[list[float]]:
        return [[round(value, DECIMALS) for value in row] for row in x.tolist()]

    return {
        source: {
            measure: {"mean": table(mean[s, m]), "std": table(std[s, m])}
            for m, measure in enumerate(MEASURES)
        }
        for s, source in enumerate(SOURCES)
    }


def _versions() -> dict[str, str]:
    import transformers

    import uncomp

    return {
        "uncomp": uncomp.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
