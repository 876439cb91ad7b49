"""RoPE is taken back: both ways of pairing dimensions, partly rotated heads, any position."""

import pytest
import torch

from uncomp import policies
from uncomp.policies import LayerView
from uncomp.rotary import Rotary


def table(size: int, positions: int = 64) -> torch.Tensor:
    rates = 100.0 ** -(torch.arange(0, size, 2).double() / size)
    angles = torch.arange(positions).double()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


def rotated(keys: torch.Tensor, positions: torch.Tensor, size: int, neox: bool) -> torch.Tensor:
    """By the definition: pairs of dimensions as complex numbers."""
    out = keys.clone()
    for i in range(size // 2):
        a, b = (i, i + size // 2) if neox else (2 * i, 2 * i + 1)
        angle = positions * 100.0 ** -(2 * i / size)
        number = torch.complex(keys[..., a], keys[..., b]) * torch.polar(
            torch.ones(()).double(), angle
        )
        out[..., a], out[..., b] = number.real, number.imag
    return out


@pytest.mark.parametrize("neox", [True, False], ids=["halves", "neighbours"])
@pytest.mark.parametrize("size", [16, 10], ids=["whole head", "part of it"])
def test_undo(neox: bool, size: int) -> None:
    torch.manual_seed(size)
    keys = torch.randn(3, 40, 16).double()
    positions = torch.stack([torch.randperm(64)[:40] for _ in range(3)])
    given = rotated(keys, positions.double(), size, neox)
    assert not torch.allclose(given, keys)
    found = Rotary(table(size), neox).undo(given, positions)
    torch.testing.assert_close(found, keys, rtol=0, atol=1e-12)


def test_garbage_stays_where_it_is() -> None:
    keys = torch.randn(1, 4, 8)
    keys[0, 3] = float("nan")
    positions = torch.tensor([[0, 1, 2, -(2**40)]])
    found = Rotary(table(8).float()).undo(keys.bfloat16(), positions)
    assert found.dtype == torch.float32
    assert found[0, :3].isfinite().all()


def test_policy_sees_the_same_keys_wherever_they_stand() -> None:
    """Scores before RoPE do not depend on positions; those of KeyDiff do."""
    torch.manual_seed(0)
    keys = torch.randn(2, 30, 16).double() + 2.0
    lengths = torch.tensor([30, 21])
    policy = policies.get("prerope_key_difference")
    scores = []
    for shift in (0, 33):
        positions = (torch.arange(30) + shift).expand(2, -1)
        given = rotated(keys, positions.double(), 16, True)
        given[1, 21:] = float("nan")
        view = LayerView(0, given, lengths, positions, rotary=Rotary(table(16)))
        scores.append(policy.score(view))
        plain = policies.get("key_difference").score(view)
        assert not torch.allclose(plain[0] + 1, scores[-1][0], atol=1e-3)
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-10)
    assert (scores[0][1, 21:] == 0).all()
