"""The worked example every kernel test shares: four heads of 8 tokens, head size 4."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

# For paged_cases.py; the import mode of the suite keeps test folders off sys.path.
sys.path.insert(0, str(Path(__file__).parent))

A = [
    [3, 1, 0, -1],
    [2, -1, 1, 0],
    [-1, 2, 1, 1],
    [0, -2, 3, 1],
    [1, 0, -1, 2],
    [-3, 1, -2, 0],
    [-1, -1, 0, -2],
    [2, 3, -1, 1],
]
B = [
    [4, 1, 0, 0],
    [-3, 0, 1, 0],
    [5, -1, 0, 1],
    [-4, 1, -1, 0],
    [3, 0, 1, -1],
    [-5, -1, 0, 0],
    [4, 0, -1, 1],
    [-4, 0, 0, -1],
]


@pytest.fixture
def oracle_heads() -> Tensor:
    """`[4, 8, 4]` float64: a rank-one head, an isotropic one, and two in between."""
    rank_one = torch.outer(torch.arange(8.0), torch.tensor([1.0, 2.0, -1.0, 1.0]))
    isotropic = torch.cat([torch.eye(4), -torch.eye(4)])
    return torch.stack([rank_one, isotropic, torch.tensor(A), torch.tensor(B)]).double()


@pytest.fixture
def oracle_lengths() -> Tensor:
    """All 8 tokens of every head are valid."""
    return torch.full((4,), 8)
