"""Queries are copied where they are to be, and nowhere else."""

import pytest
import torch

from uncomp.kernels.record.launch import record


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "size"), [(9, 64), (3, 80), (32, 128)])
def test_copies_to_the_addresses(dtype, heads, size):
    layers, window, tokens = 2, 4, 5
    store = torch.full((2, window, layers, heads, size), float("nan"), dtype=dtype)
    qkv = torch.randn(tokens, heads + 2, size).to(dtype)
    queries = qkv[:, :heads]
    executions = torch.zeros(layers, dtype=torch.int64)
    places = {1: (0, 3), 3: (1, 0), 4: (0, 1)}  # token -> (slot, position in the window)
    addresses = torch.zeros(tokens, dtype=torch.int64)
    for token, (slot, at) in places.items():
        addresses[token] = store[slot, at].data_ptr()
    record(queries, addresses, executions, 1)
    for token, (slot, at) in places.items():
        assert torch.equal(store[slot, at, 1], queries[token])
    assert store[:, :, 0].isnan().all()
    assert int(store[:, :, 1].isnan().all(-1).all(-1).sum()) == 2 * window - len(places)
    assert executions.tolist() == [0, 1]


def test_source_rows():
    store = torch.zeros(2, 3, 2, 64)
    queries = torch.randn(7, 2, 64)
    addresses = torch.tensor([store[1, 0].data_ptr(), 0, store[0, 0].data_ptr()])
    executions = torch.zeros(3, dtype=torch.int64)
    record(queries, addresses, executions, 2, source=torch.tensor([6, 2, 0]))
    assert torch.equal(store[1, 2], queries[6])
    assert torch.equal(store[0, 2], queries[0])
    assert not store[:, :2].any()


def test_rejects_what_it_cannot_read():
    addresses, executions = torch.zeros(4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="not contiguous"):
        record(torch.zeros(4, 8, 2).transpose(1, 2), addresses, executions, 0)
    with pytest.raises(ValueError, match="4 addresses for 3 rows"):
        record(torch.zeros(3, 2, 8), addresses, executions, 0)
