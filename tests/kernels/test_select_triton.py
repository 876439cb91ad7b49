"""Limits, pooling and choice on the device against `naive.py`, exactly."""

import dataclasses

import pytest
import torch
from paged_cases import Pruned, make_case
from torch import Tensor

from uncomp.kernels.paged import Holdings, Rows, head_lengths, sub_blocks
from uncomp.kernels.select import BREAK, launch, pool_scores, top_entries
from uncomp.kernels.select.launch import Terms, choose, entry_places, limits, pool
from uncomp.kernels.variant import Config

LOWEST, NAN = float("-inf"), float("nan")
BLOCK = 4
#: several tiles a head
SMALL = Config({"TILE": 32})
LENGTHS = [61, 50, 7, 38, 60]
#: kept and full blocks of the last compaction; the last one is a prompt that was pruned
COMPACTED = [None, (5, 9), None, (2, 8), Pruned(7, (0, 4))]


def make_terms(
    lengths=LENGTHS, compacted=COMPACTED, sinks=3, window=6, spans=0, full=None, **options
):
    """Terms over random cache places; unused positions are ones that would be forced."""
    case = make_case(lengths, compacted, head_size=16, block_size=BLOCK, **options)
    rows, holdings, caches = case.rows, case.holdings, case.caches
    positions = torch.full((caches.layers, caches.tensors[0].shape[0], caches.heads, BLOCK), -1)
    for row, compaction in enumerate(compacted):
        for layer in range(caches.layers) if compaction else ():
            for head in range(caches.heads):
                count = stored(holdings, int(rows.slots[row]), layer, head)
                full_then = compaction.full if isinstance(compaction, Pruned) else compaction[1]
                seen = full_then * BLOCK
                kept = torch.randperm(seen)[: count * BLOCK].sort().values.view(-1, BLOCK)
                at = sub_blocks(rows, holdings, row, layer, head, count)
                positions[at.unbind(1)] = kept
    if full is None:
        full = [length // BLOCK for length in lengths]
    protect = torch.randint(0, max(lengths), (len(lengths), spans, 2)).sort(2).values
    protect[:, spans // 2 :, 1] = protect[:, spans // 2 :, 0] + 3  # one short, one of any length
    return Terms(
        rows, holdings, positions.int(), torch.tensor(full, dtype=torch.int32),
        protect.int(), sinks, window,
    )  # fmt: skip


def stored(holdings: Holdings, slot: int, layer: int, head: int) -> int:
    """Sub-blocks of a head whose entries are not where their number says."""
    count = int(holdings.counts[layer, slot, head]) if slot >= 0 else 0
    pruned = slot >= 0 and int(holdings.spans[slot, 1]) == 0
    return count + int(holdings.spans[slot, 0]) if pruned else count


def dense(terms: Terms, layer: int, row: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions, valid, eligible and forced of one layer of a request, `[H, N]`: the rules as
    `Compactor._choose` states them."""
    lengths = head_lengths(terms.rows, terms.holdings, BLOCK)[layer, row]
    total, slot = int(terms.rows.lengths[row]), int(terms.rows.slots[row])
    at = torch.arange(int(lengths.max()))
    positions = total - lengths[:, None] + at
    for head in range(terms.shape[2]):
        count = stored(terms.holdings, slot, layer, head)
        places = sub_blocks(terms.rows, terms.holdings, row, layer, head, count)
        positions[head, : count * BLOCK] = terms.positions[places.unbind(1)].flatten()
    valid = at < lengths[:, None]
    eligible = valid & (positions < int(terms.full[row]) * BLOCK)
    forced = eligible & ((positions < terms.sinks) | (positions >= total - terms.window))
    for begin, end in terms.protect[row].tolist():
        forced |= eligible & (positions >= begin) & (positions < end)
    return positions, valid, eligible, forced


def each(terms: Terms):
    layers, requests, _ = terms.shape
    return ((layer, row) for layer in range(layers) for row in range(requests))


def scores(terms: Terms, kind: str) -> Tensor:
    """`[L, R, H, N]` with NaN wherever nothing may be read."""
    lengths = head_lengths(terms.rows, terms.holdings, BLOCK)
    shape = (*terms.shape, int(lengths.max()) + 3)
    if kind == "equal":
        raw = torch.full(shape, 0.25)
    elif kind == "ties":
        raw = torch.randint(-2, 3, shape) / 4.0
        raw[raw == 0] *= torch.where(torch.rand_like(raw[raw == 0]) < 0.5, -1.0, 1.0)  # -0 and 0
    else:
        raw = torch.randn(shape) * 10.0 ** torch.randint(-30, 30, shape)
    if kind == "odd":
        at = torch.rand(shape)
        raw[at < 0.3] = LOWEST
        raw[at > 0.8] = NAN
        raw[(at > 0.5) & (at < 0.55)] = float("inf")
    beyond = torch.arange(shape[3]) >= lengths[..., None]
    return raw.masked_fill(beyond, NAN)


def deal(terms: Terms, eligible: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
    """Random legal counts, the bounds among them, and their offsets."""
    most = eligible // BLOCK
    least = torch.minimum(-(-forced // BLOCK), most)
    share = torch.randint(0, 5, terms.shape) / 4
    counts = (least + ((most - least) * share).floor()).int()
    return counts, (counts.cumsum(2) - counts).int()


def pooled_by_reference(
    terms: Terms, raw: Tensor, width: int, kind: str = "max", places: Tensor | None = None
) -> Tensor:
    """`places`: [R, P], of every position."""
    pooled = torch.full_like(raw, NAN)
    for layer, row in each(terms):
        positions, valid, _, _ = dense(terms, layer, row)
        limit = (valid.sum(1) - terms.window).clamp_min(0)
        at = None
        if places is not None:
            at = places[row][positions.clamp(0, places.shape[1] - 1)]
        part = pool_scores(raw[layer, row, :, : valid.shape[1]], width, kind, limit, at)
        pooled[layer, row, :, : valid.shape[1]] = part.masked_fill(~valid, NAN)
    return pooled


def check_choice(terms: Terms, raw: Tensor, pooled: Tensor, config=SMALL) -> None:
    eligible, forced = limits(terms, config=config)
    counts, offsets = deal(terms, eligible, forced)
    width = BLOCK * int(counts.sum(2).max()) + 2
    out = torch.full((*terms.shape[:2], width), -7, dtype=torch.int32)
    assert choose(raw, pooled, terms, counts, offsets, out, config) is out
    for layer, row in each(terms):
        _, _, may, must = dense(terms, layer, row)
        n = may.shape[1]
        keep = counts[layer, row].long() * BLOCK
        parts = (pooled[layer, row, :, :n], raw[layer, row, :, :n])
        best = top_entries(*parts, may, must, keep)
        expected = torch.cat([best[head, : int(keep[head])] for head in range(len(keep))])
        got = out[layer, row]
        assert got[: len(expected)].tolist() == expected.tolist()
        assert (got[len(expected) :] == -7).all(), "written beyond the entries that stay"


@pytest.mark.parametrize("spans", [0, 2])
@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (3, 6), (20, 30)])
def test_limits(spans, sinks, window):
    terms = make_terms(sinks=sinks, window=window, spans=spans, full=[15, 10, 1, 9, 14])
    eligible, forced = limits(terms, config=SMALL)
    assert eligible.dtype == forced.dtype == torch.int32
    for layer, row in each(terms):
        _, _, may, must = dense(terms, layer, row)
        assert eligible[layer, row].tolist() == may.sum(1).tolist()
        assert forced[layer, row].tolist() == must.sum(1).tolist()


def test_layers_that_share():
    compacted = [None, (5, 9), None, (2, 8), Pruned(7, (0, 4, 2))]
    terms = make_terms(compacted=compacted, spans=2, layers=3, shared=True)
    raw = scores(terms, "ties")
    check_choice(terms, raw, pooled_by_reference(terms, raw, 3))
    part = dataclasses.replace(
        terms, holdings=terms.holdings.part(1, 3), positions=terms.positions[1:]
    )
    for of_part, of_all in zip(limits(part), limits(terms), strict=True):
        assert of_part.equal(of_all[1:])


def test_limits_count_a_whole_head_and_nothing():
    terms = make_terms([8, 0, 3, 8], [None] * 4, window=1, sinks=0, full=[2, 0, 0, 0])
    eligible, forced = limits(terms)
    assert eligible[0, :, 0].tolist() == [8, 0, 0, 0]
    assert forced[1, :, 2].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("width", [1, 3, 7])
@pytest.mark.parametrize("kind", ["random", "odd"])
def test_pooling(width, kind):
    terms = make_terms()
    raw = scores(terms, kind)
    out = torch.full_like(raw, NAN)
    assert pool(raw, terms, width, out) is out
    expected = pooled_by_reference(terms, raw, width)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_pooling_reaches_across_tiles():
    terms = make_terms([2100], [None], window=4)
    raw = scores(terms, "random")
    out = torch.full_like(raw, NAN)
    pool(raw, terms, 5, out)
    expected = pooled_by_reference(terms, raw, 5)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("length", [1, 2, 5, 16])
@pytest.mark.parametrize("lengths", [None, [2100], [1, 70, 1024]])
def test_moving_average(length, lengths):
    check_moving_average(length, lengths)


def test_moving_average_reaches_over_whole_tiles(monkeypatch):
    """64 entries on and 32 back, in tiles of 16."""
    monkeypatch.setattr(launch, "POOL_CONFIGS", (Config({"TILE": 16}),))
    check_moving_average(16, [150])


def check_moving_average(length, lengths):
    terms = (
        make_terms() if lengths is None else make_terms(lengths, [None] * len(lengths), window=4)
    )
    raw = scores(terms, "random").abs().clamp(1e-20, 1e20)
    out = torch.full_like(raw, NAN)
    assert pool(raw, terms, length, out, kind="ema") is out
    expected = pooled_by_reference(terms, raw, length, "ema")
    # Sums of positive float32 numbers in another order, weights rounded once more.
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("shared", [False, True], ids=["layer", "all-layers"])
def test_moving_average_by_places(length, shared, monkeypatch):
    """Kept entries stand where their token does, wherever they lie."""
    monkeypatch.setattr(launch, "POOL_CONFIGS", (Config({"TILE": 16}),))
    compacted = [None, (5, 9), None, (2, 8), Pruned(7, (0, 4, 2))]
    terms = make_terms(compacted=compacted, layers=3, shared=shared, window=4)
    shape = len(LENGTHS), max(LENGTHS)
    steps = torch.randint(1, 30, shape) + BREAK * (torch.rand(shape) < 0.1)
    places = steps.cumsum(1).int()
    raw = scores(terms, "random").abs().clamp(1e-20, 1e20)
    found = torch.full(raw.shape, -5, dtype=torch.int32)
    assert entry_places(places, terms, found) is found
    for layer, row in each(terms):
        positions, valid, _, _ = dense(terms, layer, row)
        got = found[layer, row, :, : valid.shape[1]]
        assert got[valid].equal(places[row][positions[valid]])
        assert (got[~valid] == -5).all()
    part = dataclasses.replace(
        terms, holdings=terms.holdings.part(1, 3), positions=terms.positions[1:]
    )
    again = entry_places(places, part, torch.full_like(found[1:], -5))
    assert again.equal(found[1:])
    out = torch.full_like(raw, NAN)
    assert pool(raw, terms, length, out, "word", found) is out
    expected = pooled_by_reference(terms, raw, length, "word", places)
    # As in `check_moving_average`.
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=0, equal_nan=True)


def test_positions_beyond_the_known_places_stand_at_the_first():
    terms = make_terms([20], [None])
    found = entry_places(torch.full((1, 9), 4).int(), terms, torch.zeros(*terms.shape, 23).int())
    assert found[0, 0, 0].tolist() == [4] * 9 + [0] * 14


@pytest.mark.parametrize(
    ("width", "kind", "says"),
    [
        (4, "max", "positive odd"),
        (0, "ema", "positive number"),
        (3, "mean", "kind must"),
        (3, "word", "needs the"),
    ],
)
def test_pooling_refuses(width, kind, says):
    terms = make_terms([8], [None])
    raw = scores(terms, "random")
    with pytest.raises(ValueError, match=says):
        pool(raw, terms, width, torch.empty_like(raw), kind=kind)


@pytest.mark.parametrize("spans", [0, 2])
@pytest.mark.parametrize("kind", ["random", "ties", "odd", "equal"])
def test_choice(kind, spans):
    terms = make_terms(spans=spans)
    raw = scores(terms, kind)
    check_choice(terms, raw, pooled_by_reference(terms, raw, 5))


def test_the_raw_score_breaks_a_tie_of_the_pooled_one_and_the_number_the_rest():
    terms = make_terms([24], [None], sinks=0, window=0)
    pooled = torch.zeros(2, 1, 3, 24)
    pooled[..., 20:] = 1.0
    raw = torch.zeros(2, 1, 3, 24)
    raw[..., [5, 7, 13]] = 2.0
    counts = torch.full((2, 1, 3), 2, dtype=torch.int32)
    offsets = (counts.cumsum(2) - counts).int()
    out = torch.empty(2, 1, 24, dtype=torch.int32)
    choose(raw, pooled, terms, counts, offsets, out, SMALL)
    assert out.tolist() == [[[0, 5, 7, 13, 20, 21, 22, 23] * 3]] * 2


def test_negative_zero_ties_with_zero_and_nan_with_the_lowest():
    terms = make_terms([8], [None], sinks=0, window=0)
    # kept after 5 and 6: the lower number of the two zeros; then of NaN and -inf
    scores = torch.tensor([NAN, LOWEST, -0.0, 0.0, -1.0, 3.0, 3.0, LOWEST])
    raw = scores.expand(2, 1, 3, 8).contiguous()
    out = torch.full((2, 1, 12), -7, dtype=torch.int32)
    counts = torch.ones(2, 1, 3, dtype=torch.int32)
    choose(raw, raw, terms, counts, (counts.cumsum(2) - counts).int(), out, SMALL)
    assert out[0, 0].tolist() == [2, 3, 5, 6] * 3


def test_nothing_kept_and_everything_kept():
    terms = make_terms([16], [None], sinks=0, window=0)
    raw = scores(terms, "odd")
    counts = torch.tensor([0, 4, 0], dtype=torch.int32).expand(2, 1, 3).contiguous()
    offsets = torch.tensor([0, 0, 4], dtype=torch.int32).expand(2, 1, 3).contiguous()
    out = torch.full((2, 1, 20), -7, dtype=torch.int32)
    choose(raw, raw, terms, counts, offsets, out, SMALL)
    assert out[0, 0].tolist() == [*range(16), *[-7] * 4]


def test_only_forced_entries_stay():
    terms = make_terms([32], [None], sinks=4, window=4)
    raw = scores(terms, "random")
    counts = torch.full((2, 1, 3), 2, dtype=torch.int32)
    out = torch.full((2, 1, 24), -7, dtype=torch.int32)
    choose(raw, raw, terms, counts, (counts.cumsum(2) - counts).int(), out, SMALL)
    assert out[0, 0].tolist() == [0, 1, 2, 3, 28, 29, 30, 31] * 3


@pytest.mark.parametrize("width", [42, 38])
def test_counts_that_cannot_be_met_stay_inside_the_head(width):
    """A caller's mistake, on which the host cannot look: nothing else is overwritten."""
    terms = make_terms([16], [None], sinks=12, window=4)
    raw = scores(terms, "random")
    counts = torch.tensor([9, 1, 0], dtype=torch.int32).expand(2, 1, 3).contiguous()
    offsets = torch.tensor([0, 9, 10], dtype=torch.int32).expand(2, 1, 3).contiguous()
    memory = torch.full((2 * width + 16,), -7, dtype=torch.int32)
    choose(raw, raw, terms, counts, offsets, memory[: 2 * width].view(2, 1, width), SMALL)
    expected = [*range(16), *[-7] * 20, 0, 1, 2, 3, *[-7] * 16]
    assert memory[:width].tolist() == expected[:width]
    assert memory[width : 2 * width].tolist() == expected[:width]
    assert (memory[2 * width :] == -7).all()


@pytest.mark.parametrize("kind", ["random", "ties"])
def test_the_default_configuration_over_several_tiles(kind):
    terms = make_terms([4500], [None], spans=1)
    terms = dataclasses.replace(terms, holdings=terms.holdings.part(0, 1))
    terms = dataclasses.replace(terms, positions=terms.positions[:1])
    raw = scores(terms, kind)
    check_choice(terms, raw, pooled_by_reference(terms, raw, 7), config=None)


def test_block_rows_with_a_stride():
    terms = make_terms()
    wide = torch.full((len(LENGTHS), terms.rows.blocks.shape[1] + 3), -9, dtype=torch.int32)
    wide[:, :-3] = terms.rows.blocks
    rows = Rows(wide[:, :-3], terms.rows.lengths, terms.rows.slots)
    terms = dataclasses.replace(terms, rows=rows)
    raw = scores(terms, "random")
    check_choice(terms, raw, raw)


def _refused(terms, call, message):
    with pytest.raises(ValueError, match=message):
        call(terms)


def test_what_does_not_fit_is_refused():
    terms = make_terms([16], [None])
    raw, counts = torch.zeros(2, 1, 3, 16), torch.ones(2, 1, 3, dtype=torch.int32)
    out = torch.zeros(2, 1, 12, dtype=torch.int32)
    for width in (0, 2, -1):
        _refused(terms, lambda t, w=width: pool(raw, t, w, raw.clone()), "positive odd number")
    _refused(terms, lambda t: pool(raw, t, 3, raw), "out must not be raw")
    _refused(terms, lambda t: pool(raw.double(), t, 3, raw), "raw must be contiguous")
    _refused(terms, lambda t: choose(raw, raw[..., :9], t, counts, counts, out), "pooled must be")
    _refused(terms, lambda t: choose(raw, raw, t, counts.long(), counts, out), "counts must be")
    _refused(terms, lambda t: choose(raw, raw, t, counts, counts[:1], out), "offsets must be")
    _refused(terms, lambda t: choose(raw, raw, t, counts, counts, out[:1]), "out must be")
    replaced = {
        "full": torch.zeros(2, dtype=torch.int32),
        "protect": torch.zeros(1, 2, dtype=torch.int32),
        "positions": terms.positions.long(),
        "window": -1,
    }
    for field, value in replaced.items():
        _refused(dataclasses.replace(terms, **{field: value}), limits, f"{field} must")
