"""What is served in which order, how long it may take, and recorded traffic."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from uncomp.eval.bench import serve_trace
from uncomp.eval.bench.serve_clock import Clock, described
from uncomp.eval.bench.serve_plan import SHAPES, Load, Plan, Shape

TWO = (Load("concurrency", 1), Load("concurrency", 4))


def test_arms_alternate_forth_and_back() -> None:
    order = [(s.arm, s.round) for s in Plan(SHAPES["long-prompt"], TWO, rounds=3).sessions()]
    assert order == [
        ("full", 1), ("compressed", 1),
        ("compressed", 2), ("full", 2),
        ("full", 3), ("compressed", 3),
    ]  # fmt: skip


def test_every_load_of_every_server_has_a_file_of_its_own() -> None:
    loads = (*TWO, Load("rate", 1), Load("rate", 0.5), Load("trace", 1))
    sessions = Plan(SHAPES["long-prompt"], loads).sessions()
    assert len({s.file(load) for s in sessions for load in s.loads}) == 4 * 5


@pytest.mark.parametrize(
    ("shape", "load", "requests", "count"),
    [
        ("long-prompt", Load("concurrency", 1), None, 8),
        ("long-prompt", Load("concurrency", 16), None, 64),
        ("long-prompt", Load("rate", 0.5), None, 30),
        ("long-prompt", Load("rate", 0.5), 3, 3),
        ("shared-prefix", Load("rate", 0.5), 5, 8),  # whole numbers of requests per prefix
        ("long-prompt", Load("trace", 2), None, 7),
    ],
    ids=str,
)
def test_number_of_requests(shape: str, load: Load, requests: int | None, count: int) -> None:
    plan = Plan(SHAPES[shape], (load,), requests=requests, trace_requests=7)
    assert plan.count(load) == count


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Load("concurrency", 1.5), "whole number"),
        (lambda: Load("rate", 0), "above 0"),
        (lambda: Plan(SHAPES["long-prompt"], ()), "--concurrency, --rate or --trace"),
        (lambda: Plan(SHAPES["long-prompt"], (TWO[0], TWO[0])), "twice"),
        (lambda: Plan(SHAPES["long-prompt"], TWO, rounds=0), "at least 1"),
        (lambda: Shape("x", "", 100, 8, 100, 2), "shorter than the prompt"),
        (lambda: Shape("x", "", 100, 8, 50), "both or neither"),
        (lambda: Shape("x", "", 100, 0), "at least 1"),
    ],
)
def test_nonsense_is_refused(make: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()  # type: ignore[operator]


def test_estimate_before_and_after_measuring() -> None:
    plan = Plan(Shape("s", "", 1000, 100), TWO, requests=10)
    clock = Clock(plan, prefill=1000, decode=10, start=30)
    one, four = (clock.expect(load) for load in TWO)
    assert (one, four) == (10 + 100, 10 + 25)
    sessions = plan.sessions()
    assert clock.left(sessions, servers=True) == 4 * (one + four) + 4 * 30
    assert clock.left(sessions, servers=False) == 4 * (one + four)
    clock.took(TWO[0], 2 * one)  # twice as slow as assumed: so will be the rest
    clock.started(10)
    assert clock.left(sessions[1:], servers=True) == 2 * 3 * (one + four) + 3 * 10
    text = described(plan, clock, servers=True)
    assert "full compressed compressed full" in text
    assert "concurrency 4" in text


def test_a_rate_takes_at_least_as_long_as_its_arrivals() -> None:
    plan = Plan(Shape("s", "", 10, 1), (Load("rate", 0.5),), requests=10)
    assert Clock(plan, 1e6, 1e6, 0).expect(plan.loads[0]) == 20


def trace(folder: Path, *lines: object, name: str = "t.jsonl") -> Path:
    path = folder / name
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def test_trace_of_mooncake(tmp_path: Path) -> None:
    path = trace(
        tmp_path,
        {"timestamp": 3000, "input_length": 1025, "output_length": 5, "hash_ids": [1, 2, 9]},
        {"timestamp": 2500, "input_length": 1024, "output_length": 7, "hash_ids": [1, 2]},
    )
    first, second = serve_trace.read(path, unit="ms")
    assert (first.seconds, first.prompt_tokens, first.output_tokens) == (0, 1024, 7)
    assert (second.seconds, second.blocks, second.block) == (0.5, (1, 2, 9), 512)


def test_trace_of_azure(tmp_path: Path) -> None:
    path = trace(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:17:03.9799600,374,44",
        "2023-11-16 18:17:04.0319600,396,109",
        "2023-11-16 18:18:04.0319600,1,2",
        name="t.csv",
    )
    found = serve_trace.read(path)
    assert [round(r.seconds, 6) for r in found] == [0, 0.052, 60.052]
    assert [(r.prompt_tokens, r.output_tokens) for r in found] == [(374, 44), (396, 109), (1, 2)]


def test_dates_do_not_jump_with_the_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "EST5EDT,M3.2.0,M11.1.0")  # set back on 5 November 2023
    time.tzset()
    dates = ("2023-11-05 00:30:00", "2023-11-05 03:30:00")
    lines = [{"arrival": date, "prompt_tokens": 5, "output_tokens": 1} for date in dates]
    try:
        assert serve_trace.read(trace(tmp_path, *lines))[1].seconds == 3 * 3600
    finally:
        monkeypatch.undo()
        time.tzset()


def test_trace_with_text_and_a_limit(tmp_path: Path) -> None:
    lines = [{"arrival": i, "prompt": f"text {i}", "output_tokens": 3} for i in range(5)]
    found = serve_trace.read(trace(tmp_path, *lines, ""), limit=2)
    assert [(r.seconds, r.prompt) for r in found] == [(0, "text 0"), (1, "text 1")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: must be an object"),
        ({"prompt_tokens": 5, "output_tokens": 1}, "line 2: needs one of .'arrival'"),
        ({"arrival": "noon", "prompt_tokens": 5, "output_tokens": 1}, "number or a date"),
        ({"arrival": 0, "prompt_tokens": 0, "output_tokens": 1}, "whole number of at least 1"),
        ({"arrival": 0, "prompt_tokens": 2.5, "output_tokens": 1}, "whole number of at least 1"),
        ({"arrival": 0, "prompt_tokens": 5}, "needs one of .'output_tokens'"),
        ({"arrival": 0, "prompt": [1], "output_tokens": 1}, "prompt must be text"),
        (
            {"arrival": 0, "prompt_tokens": 40, "output_tokens": 1, "hash_ids": [1, 2, 3]},
            "do not fit blocks of 512.*--trace-block",
        ),
    ],
    ids=str,
)
def test_a_bad_line_is_named(line: object, says: str, tmp_path: Path) -> None:
    good = {"arrival": 0, "prompt_tokens": 5, "output_tokens": 1}
    with pytest.raises(ValueError, match=says):
        serve_trace.read(trace(tmp_path, good, line))


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no requests"):
        serve_trace.read(trace(tmp_path, ""))
