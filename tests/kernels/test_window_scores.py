"""Window scores: worked numbers, a float64 loop as reference, padding, positions."""

import math

import pytest
import torch
from torch import Tensor

from uncomp.kernels.window_scores import window_scores

ORACLE_RAW = [
    *(0.016497, 0.073934, 0.027199, 0.200974, 0.121897, 0.362172, 0.362172),
    *(0.121897, 0.200974, 0.027199, 0.073934, 0.016497, 0.073934, 0.027199),
]
ORACLE_ROWS = [
    *(0.003972, 0.017802, 0.006549, 0.048391, 0.029351, 0.357564, 0.357564, 0.029351),
    *(0.048391, 0.006549, 0.017802, 0.003972, 0.017802, 0.006549, 0.048391, 0.0),
    *(0.012525, 0.056132, 0.02065, 0.152583, 0.092546, 0.004608, 0.004608, 0.092546),
    *(0.152583, 0.02065, 0.056132, 0.012525, 0.056132, 0.02065, 0.152583, 0.092546),
]


def reference(
    queries, keys, lengths, positions, query_positions, scale, softcap, reduce, over="sum"
):
    """By the definition, float64, one probability at a time."""
    heads, group, window, _ = queries.shape
    raw = torch.zeros(heads, keys.shape[1], dtype=torch.float64)
    for h in range(heads):
        per_query_head = torch.zeros(group, keys.shape[1], dtype=torch.float64)
        for g in range(group):
            for i in range(window):
                seen = [j for j in range(int(lengths[h])) if positions[h, j] <= query_positions[i]]
                logits = [
                    float(queries[h, g, i].double() @ keys[h, j].double()) * scale for j in seen
                ]
                if softcap:
                    logits = [softcap * math.tanh(x / softcap) for x in logits]
                top = max(logits, default=0.0)
                total = sum(math.exp(x - top) for x in logits)
                for j, x in zip(seen, logits, strict=True):
                    p = math.exp(x - top) / total
                    before = per_query_head[g, j]
                    per_query_head[g, j] = before + p if over == "sum" else max(before, p)
        raw[h] = per_query_head.sum(0) if reduce == "sum" else per_query_head.amax(0)
    return raw


def make(heads, group, window, entries, size, lengths, dtype=torch.float64):
    """Random inputs with gaps between the positions; padding is NaN, its positions garbage."""
    queries = torch.randn(heads, group, window, size).to(dtype)
    keys = torch.randn(heads, entries, size).to(dtype)
    positions = torch.randint(1, 4, (heads, entries)).cumsum(1)
    for head, length in enumerate(lengths):
        keys[head, length:] = float("nan")
        positions[head, length:] = -(2**62)
    newest = max([int(positions[h, n - 1]) for h, n in enumerate(lengths) if n] + [0])
    query_positions = torch.arange(newest - window + 1, newest + 1)
    return queries, keys, torch.tensor(lengths), positions, query_positions


SHAPES = [
    (1, 1, 1, 1, 64, [1]),
    (3, 3, 8, 50, 64, [50, 50, 50]),
    (3, 3, 8, 50, 80, [50, 17, 9]),
    (2, 7, 1, 33, 5, [33, 1]),
    (8, 4, 5, 40, 16, [40, 3, 40, 21, 1, 0, 39, 2]),
]


@pytest.mark.parametrize("over", ["sum", "max"])
@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("softcap", [0.0, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "H{}-G{}-w{}-N{}-d{}".format(*s[:5]))
def test_matches_the_definition(shape, softcap, reduce, over):
    inputs = make(*shape)
    scale = shape[4] ** -0.5
    result = window_scores(*inputs, scale, softcap, reduce, over)
    assert result.dtype == torch.float64
    expected = reference(*inputs, scale, softcap, reduce, over)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_inputs_are_computed_in_float32(dtype):
    inputs = make(3, 3, 8, 300, 64, [300, 200, 30], dtype)
    result = window_scores(*inputs, 0.125)
    exact = window_scores(inputs[0].double(), inputs[1].double(), *inputs[2:], 0.125)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-6)


def test_oracle():
    logits = torch.tensor(
        [[((5 * i + 3 * j * j) % 11) / 2 for j in range(16)] for i in range(2)]
    ).double()
    keys = torch.eye(16, dtype=torch.float64)[None]  # so that a query row is its logits
    inputs = (keys, torch.tensor([16]), torch.arange(16)[None], torch.tensor([14, 15]))
    raw = window_scores(logits[None, None], *inputs, 1.0)
    torch.testing.assert_close(
        raw[0, :14], torch.tensor(ORACLE_RAW, dtype=torch.float64), rtol=0, atol=6e-7
    )
    rows = [
        window_scores(logits[None, None, i : i + 1], *inputs[:3], torch.tensor([14 + i]), 1.0)[0]
        for i in range(2)
    ]
    torch.testing.assert_close(
        torch.cat(rows), torch.tensor(ORACLE_ROWS, dtype=torch.float64), rtol=0, atol=6e-7
    )


def test_total_mass_is_group_times_window():
    raw = window_scores(*make(4, 3, 8, 60, 32, [60, 31, 8, 1]), 0.2)
    torch.testing.assert_close(raw.sum(1), torch.full((4,), 24.0, dtype=torch.float64))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_padding_never_matters(poison):
    queries, keys, lengths, positions, query_positions = make(
        3, 2, 4, 40, 24, [40, 10, 0], torch.float32
    )
    clean, dirty = keys.clone(), keys.clone()
    for head, length in enumerate(lengths.tolist()):
        clean[head, length:] = 0.0
        dirty[head, length:] = poison
    rest = (lengths, positions, query_positions, 0.2)
    result = window_scores(queries, dirty, *rest)
    assert result.equal(window_scores(queries, clean, *rest))
    for head, length in enumerate(lengths.tolist()):
        assert result[head, length:].abs().sum() == 0


def test_query_before_every_entry_contributes_nothing():
    queries, keys = torch.randn(1, 2, 3, 8), torch.randn(1, 5, 8)
    positions = torch.arange(10, 15)[None]
    raw = window_scores(queries, keys, torch.tensor([5]), positions, torch.tensor([8, 9, 14]), 1.0)
    last = window_scores(
        queries[:, :, 2:], keys, torch.tensor([5]), positions, torch.tensor([14]), 1.0
    )
    torch.testing.assert_close(raw, last)


def test_no_entries():
    raw = window_scores(
        torch.randn(2, 1, 3, 8),
        torch.empty(2, 0, 8),
        torch.zeros(2, dtype=torch.int64),
        torch.empty(2, 0, dtype=torch.int64),
        torch.arange(3),
        1.0,
    )
    assert raw.shape == (2, 0)


def test_large_logits_do_not_overflow():
    queries: Tensor = torch.full((1, 1, 1, 4), 1e4)
    keys = torch.tensor([[[1e4] * 4, [-1e4] * 4]])
    raw = window_scores(
        queries, keys, torch.tensor([2]), torch.arange(2)[None], torch.tensor([1]), 1.0
    )
    assert raw.tolist() == [[1.0, 0.0]]


def test_inputs_stay_untouched():
    inputs = make(2, 2, 3, 9, 8, [9, 9])
    before = [tensor.clone() for tensor in inputs]
    window_scores(*inputs, 0.3, 5.0)
    assert all(a.equal(b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize(
    ("index", "name"),
    [(1, "keys"), (2, "lengths"), (3, "positions"), (4, "query_positions")],
    ids=lambda v: str(v),
)
def test_wrong_shapes_are_named(index, name):
    inputs = list(make(2, 2, 3, 9, 8, [9, 9]))
    inputs[index] = inputs[index][..., :1]
    with pytest.raises(ValueError, match=rf"{name} must be \["):
        window_scores(*inputs, 1.0)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="'sum' or 'max', got 'mean'"):
        window_scores(*make(1, 1, 1, 1, 4, [1]), 1.0, reduce="mean")  # type: ignore[arg-type]
