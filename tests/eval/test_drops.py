"""Schedules of equal cost, and an answer that is followed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_chunked_pruning import PROMPT, folder, plain, reader  # noqa: F401

from uncomp.eval.ablation.chunked import PrunedReader
from uncomp.eval.ablation.drops import keep_for, variants
from uncomp.pruning import CHOICES, Schedule


@pytest.mark.parametrize("starts", [(8,), (5, 16, 19, 26), (1, 2), (29,)])
@pytest.mark.parametrize("cost", [0.99, 0.72, 0.5])
def test_schedules_cost_what_was_asked_for(starts: tuple[int, ...], cost: float) -> None:
    keep = keep_for(cost, starts, 30)
    if keep is None:
        assert starts == (29,) or cost == 0.5  # even nothing in the last stage is more
        return
    schedule = Schedule(starts, 30)
    kept = schedule.kept(100_000, keep, 1, 0)
    assert schedule.token_layers(100_000, kept) / 3e6 == pytest.approx(cost, abs=1e-4)


def test_one_drop_reaches_costs_that_stages_do_not() -> None:
    names = [name for name, *_ in variants((5, 16, 19, 26), (2, 28), 30, 0.3)]
    assert names == ["layer 2", "layer 2, by words"]


def test_an_answer_is_followed(reader: PrunedReader, folder: Path) -> None:  # noqa: F811
    answer = [5, 17, 40, 3]
    reader.read(PROMPT, Schedule((), 4), 1.0, CHOICES["handed-on"])
    after = reader.follow(answer, len(PROMPT))
    expected = plain(folder, PROMPT + answer)[len(PROMPT) :]
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-4)
