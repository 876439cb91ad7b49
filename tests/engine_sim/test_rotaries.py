"""Where the rotation of keys is found in a model, and what happens where it is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from uncomp.engine import worker_base
from uncomp.engine.rotaries import rotaries
from uncomp.engine.worker_base import CompactingWorker

TABLE = torch.rand(32, 8)


class Rope(nn.Module):
    def __init__(self, table: torch.Tensor | None, neox: bool = True) -> None:
        super().__init__()
        self.cos_sin_cache, self.is_neox_style = table, neox


def model(*ropes: nn.Module | None) -> nn.Module:
    whole = nn.Module()
    whole.layers = nn.ModuleList()
    for rope in ropes:
        layer = nn.Module()
        layer.self_attn = nn.Module()
        layer.self_attn.attn = nn.Identity()
        if rope is not None:
            layer.self_attn.rotary_emb = rope
        whole.layers.append(layer)
    return whole


def names(count: int) -> list[str]:
    return [f"layers.{i}.self_attn.attn" for i in range(count)]


def test_stands_beside_the_attention() -> None:
    whole = model(Rope(TABLE), Rope(TABLE, neox=False), Rope(None), Rope(TABLE[None]), None)
    first, second, *others = rotaries(whole, names(5))
    assert first is not None
    assert first.table is TABLE
    assert first.neox
    assert second is not None
    assert not second.neox
    assert others == [None, None, None]
    assert rotaries(whole, ["elsewhere.attn"]) == [None]


def worker(needs: bool, rope: bool, *ropes: nn.Module | None) -> CompactingWorker:
    made = CompactingWorker.__new__(CompactingWorker)
    made._policy = SimpleNamespace(needs_rotary=needs, name="mine")  # type: ignore[assignment]
    made.model_runner = SimpleNamespace(get_model=lambda: model(*ropes))
    text = SimpleNamespace(rope_parameters={"rope_theta": 1e4} if rope else None)
    made.model_config = SimpleNamespace(hf_text_config=text)
    made._attention_layers = lambda: dict.fromkeys(names(len(ropes)))  # type: ignore[method-assign]
    return made


def test_a_policy_that_needs_it_does_not_start_without() -> None:
    with pytest.raises(RuntimeError, match="RoPE was not found in Module, and policy 'mine'"):
        worker(True, True, Rope(TABLE), None)._rotaries()


def test_others_start_and_say_what_requests_get(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(worker_base.logger, "warning", lambda text, *args: said.append(text % args))
    assert worker(False, True, Rope(TABLE), None)._rotaries()[1] is None
    assert "(prerope_key_difference, hybrid) score requests like key_difference" in said[0]
    # Found everywhere, or nothing to find: nothing to say.
    assert all(worker(True, True, Rope(TABLE))._rotaries())
    assert worker(True, False, None)._rotaries() == [None]
    assert len(said) == 1
