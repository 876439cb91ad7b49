"""Which part of a calibration file belongs to a worker: its layers, its KV heads."""

from types import SimpleNamespace

import pytest
import torch

from uncomp.calibration.file import CalibrationError
from uncomp.config import UncompConfig
from uncomp.engine import calibrated
from uncomp.importance import Importance


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
    shares = torch.rand(2, 4, kv_heads, dtype=torch.float64)
    file = SimpleNamespace(
        scores=lambda source, measure: table,
        head_importance=lambda: Importance((0.25, 0.5), shares),
    )
    monkeypatch.setattr(calibrated, "load_checked", lambda config, model: file)
    engine = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=None),
        parallel_config=SimpleNamespace(rank=rank, tensor_parallel_size=ranks),
    )
    config = UncompConfig(keep=0.5, policy="entropy")
    found = calibrated.rank_entropies(config, engine, layers, len(heads))
    assert found is not None
    assert torch.equal(found, table[layers][:, heads])
    # A file may be there for the stages of prompts alone.
    other = UncompConfig(keep=0.5, policy="adakv", prefill_keep=0.5, calibration="file")
    assert calibrated.rank_entropies(other, engine, layers, len(heads)) is None
    assert calibrated.rank_needs(other, engine, layers, len(heads)) is None
    sharing = UncompConfig(keep=0.5, shares="calibrated", calibration="file")
    needs = calibrated.rank_needs(sharing, engine, layers, len(heads))
    assert isinstance(needs, Importance)
    assert torch.equal(needs.shares, shares[:, layers][:, :, heads])


def test_a_stage_has_its_part_of_the_pyramid() -> None:
    engine = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=5))
    )
    needs = calibrated.rank_needs(UncompConfig(keep=0.5, shares="pyramid"), engine, [0, 2, 4], 2)
    assert needs is not None
    for row, share in zip(needs.at(0.5).tolist(), (1.95, 1.0, 0.05), strict=True):
        assert row == pytest.approx([share, share])


def test_stages_are_the_settings_own_or_those_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    entropy = torch.tensor([[0.9, 0.7], [0.9, 0.9], [0.5, 0.5], [0.6, 0.6]], dtype=torch.float64)
    file = SimpleNamespace(scores=lambda source, measure: entropy)
    monkeypatch.setattr(calibrated, "load_checked", lambda config, model: file)
    model = SimpleNamespace(num_hidden_layers=4)

    def starts(**given: str) -> tuple[int, ...]:
        config = UncompConfig(keep=1.0, prefill_keep=0.5, calibration="file", **given)
        found = calibrated.schedule_of(config, model)
        assert found is not None
        return found.starts

    assert calibrated.schedule_of(UncompConfig(keep=0.5), model) is None
    assert starts() == (2,)
    assert starts(prefill_stages="1,3") == (1, 3)
    with pytest.raises(ValueError, match=r"different layers of 1\.\.3"):
        starts(prefill_stages="1,4")
    entropy = torch.arange(8.0).view(4, 2)
    with pytest.raises(CalibrationError, match="set prefill_stages"):
        starts()
