"""Slots, remembered queries, working memory and time of a device."""

import pytest
import torch

from uncomp.engine.arena import Arena, aligned
from uncomp.engine.device_clock import DeviceClock
from uncomp.engine.device_state import DeviceRequests, DeviceSlot, QueryStore
from uncomp.kernels.paged import Rows, head_lengths, stored_sub_blocks, sub_blocks
from uncomp.kernels.record.launch import record

CPU = torch.device("cpu")


def test_slots_are_reused_and_never_shared() -> None:
    requests = DeviceRequests(2, 3, 2, CPU)
    assert requests.index_of("a") == -1
    for name in ("a", "b"):
        requests.slots[name] = DeviceSlot(requests.take(), 1, 4, (6,), 3, None)
    assert sorted([requests.index_of("a"), requests.index_of("b")]) == [0, 1]
    with pytest.raises(RuntimeError, match="all 2 slots"):
        requests.take()
    index = requests.index_of("a")
    requests.drop("a")
    requests.drop("a")
    assert "a" not in requests
    assert len(requests) == 1
    assert requests.take() == index


@pytest.mark.parametrize("tokens", [3, 4, 5, 11])
def test_the_last_queries_come_back_in_order(tokens: int) -> None:
    layers, window, heads, size = 2, 4, 3, 8
    store = QueryStore(layers, window, (heads, size), torch.float32, CPU)
    queries = torch.randn(layers, tokens, heads, size)
    executions = torch.zeros(layers, dtype=torch.int64)
    for name in ("other", "mine"):  # the last one to be written must not reach the first
        for position in range(tokens):
            [address] = store.addresses(name, position, position + 1)
            for layer in range(layers):
                rows = queries[layer, position : position + 1] * (1 if name == "mine" else -1)
                record(rows, torch.tensor([address]), executions, layer)
    last = store.last("mine", tokens, window)
    assert torch.equal(last, queries[:, max(0, tokens - window) :])
    assert torch.equal(store.last("other", tokens, window), -last)
    assert torch.equal(store.last("mine", tokens, 2), last[:, -2:])
    assert torch.equal(store.of_layer(1, "mine", tokens, 2), last[1, -2:])
    store.drop("mine")
    assert len(store) == 1
    with pytest.raises(RuntimeError, match="no queries were recorded for mine"):
        store.last("mine", tokens, window)


def test_buffers_never_move() -> None:
    store = QueryStore(1, 2, (1, 4), torch.float16, CPU)
    before = {name: store.addresses(name, 0, 2) for name in map(str, range(9))}
    assert all(store.addresses(name, 0, 2) == found for name, found in before.items())
    assert len({a for found in before.values() for a in found}) == 18


def test_arena() -> None:
    arena = Arena(4096, CPU)
    first, second = arena.take((3, 5)), arena.take((7,), torch.int32)
    assert first.shape == (3, 5)
    assert second.dtype == torch.int32
    assert second.data_ptr() - first.data_ptr() == aligned(60) == 256
    assert arena.rest().numel() == 4096 - 512
    with pytest.raises(RuntimeError, match="are needed, 4096 are there"):
        arena.take((1000,))
    arena.clear()
    assert arena.take((1024,)).data_ptr() == first.data_ptr()


def test_clock_adds_up_once() -> None:
    clock = DeviceClock(CPU, parts=2)
    for _ in range(2):
        clock.add(1.0, 1.5, 3.5)
    assert clock.collect() == (1.0, 4.0)
    assert clock.collect() == (0.0, 0.0)
    assert clock.mark() <= clock.mark()
    with pytest.raises(ValueError, match="2 marks, need 3"):
        clock.add(1.0, 1.5)


def test_pruned_prompts_are_shorter_in_later_layers() -> None:
    """Blocks of four tokens, a prompt of 18: of its four full blocks, layers 1 and 2 lack two."""
    requests = DeviceRequests(3, 2, 4, CPU)
    positions = torch.full((3, 10, 2, 4), -1, dtype=torch.int32)
    whole = torch.arange(18)
    left = torch.tensor([0, 3, 5, 7, 9, 11, 13, 15, 16, 17])
    blocks = torch.tensor([7, 2, 9, 4], dtype=torch.int32)
    requests.place_pruned("a", 18, blocks, [whole, left, left], positions)
    slot = requests.slots["a"]
    assert (slot.generation, slot.full_blocks, slot.held) == (0, 4, (8, 4, 4))
    rows = Rows(
        torch.tensor([[7, 2, 9, 4, 5, 0]], dtype=torch.int32),
        torch.tensor([19], dtype=torch.int32),
        torch.tensor([slot.index], dtype=torch.int32),
    )
    assert head_lengths(rows, requests.holdings, 4)[:, 0, 0].tolist() == [19, 11, 11]
    for layer, at in enumerate([whole, left, left]):
        stored = stored_sub_blocks(rows, requests.holdings, 0, layer).tolist()
        assert stored == [len(at) // 4] * 2
        for head in range(2):
            places = sub_blocks(rows, requests.holdings, 0, layer, head, stored[head] + 1)
            assert places[-1].tolist() == [layer, 5, head]  # the block being filled
            found = positions[places[:-1].unbind(1)].flatten().tolist()
            assert found == at[: stored[head] * 4].tolist()
    assert positions[:, [0, 1, 3, 5, 6, 8]].eq(-1).all()
    requests.drop("a")
    assert len(requests) == 0
