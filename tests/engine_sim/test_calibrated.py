"""Which part of a calibration file belongs to a worker: its layers, its KV heads."""

from types import SimpleNamespace

import pytest
import torch

from uncomp.config import UncompConfig
from uncomp.engine import calibrated


@pytest.mark.parametrize(
    ("rank", "ranks", "layers", "kv_heads", "heads"),
    [
        (0, 1, [0, 1, 2, 3], 4, [0, 1, 2, 3]),
        (1, 2, [0, 1, 2, 3], 4, [2, 3]),
        (1, 1, [2, 3], 4, [0, 1, 2, 3]),
        (2, 2, [2, 3], 4, [0, 1]),
        (3, 2, [2, 3], 4, [2, 3]),
        (1, 4, [0, 1, 2, 3], 2, [0]),
        (2, 4, [0, 1, 2, 3], 2, [1]),
    ],
    ids=["alone", "tensor", "stage", "stage and tensor 0", "stage and tensor 1", "copy", "no copy"],
)
def test_share_of_a_rank(
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    ranks: int,
    layers: list[int],
    kv_heads: int,
    heads: list[int],
) -> None:
    table = torch.rand(4, kv_heads, dtype=torch.float64)
    file = SimpleNamespace(scores=lambda source, measure: table)
    monkeypatch.setattr(calibrated, "load_checked", lambda config, model: file)
    engine = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=None),
        parallel_config=SimpleNamespace(rank=rank, tensor_parallel_size=ranks),
    )
    found = calibrated.rank_entropies(UncompConfig(keep=0.5), engine, layers, len(heads))
    assert found is not None
    assert torch.equal(found, table[layers][:, heads])
