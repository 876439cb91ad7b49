"""A calibration file in which heads need very unequal parts; nothing is measured."""

from __future__ import annotations

from pathlib import Path

import torch

from uncomp.calibration.file import STATISTICS, Calibration, identity_hash, model_identity
from uncomp.config import MEASURES, SOURCES
from uncomp.importance import KEEPS


def unequal_calibration(model: Path, seed: int = 0) -> Calibration:
    """Shares of heads between next to nothing and everything, by chance."""
    from transformers import AutoConfig

    identity = model_identity(AutoConfig.from_pretrained(model))
    layers, heads = identity["num_layers"], identity["num_kv_heads"]
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(layers, heads, generator=generator) ** 4 * 2
    table = [[0.5] * heads for _ in range(layers)]
    return Calibration(
        model=model.name,
        identity=identity,
        config_hash=identity_hash(identity),
        num_layers=layers,
        num_query_heads=identity["num_query_heads"],
        num_kv_heads=heads,
        head_dim=identity["head_dim"],
        truncation=1,
        unit_norm=True,
        samples=1,
        tokens_per_sample=1,
        seed=seed,
        text=[],
        versions={},
        created="",
        entropy={s: {m: {t: table for t in STATISTICS} for m in MEASURES} for s in SOURCES},
        importance={
            "keeps": list(KEEPS),
            "shares": [(2 * keep * shares).clamp(0, 1).tolist() for keep in KEEPS],
            "samples": 1,
            "tokens": 1,
        },
    )
