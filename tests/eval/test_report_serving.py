"""Results of `uncomp bench serve` in a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from uncomp.eval.bench import serve_rows
from uncomp.eval.bench.serve_records import Measured, Pool
from uncomp.eval.report.serving import read_serving
from uncomp.eval.run.records import Case


def one(arm: str, round_: int, level: float, speed: float, mode: str = "concurrency") -> Measured:
    sampled = {"seconds": [0.0, 2.0], "held": [0.0, 0.5], "running": [1, 1], "waiting": [0, 0]}
    pool = Pool(101, 32, 1010.0)
    return Measured(
        arm, round_, mode, level, 9.0, {"output_throughput": speed}, sampled, 0, (), pool
    )


def written(path: Path, results: list[Measured], **kv: Any) -> Path:
    path.write_text(json.dumps(serve_rows.as_json(results, {"kv": kv}, {})))
    return path


RESULTS = [
    *(one("full", r, level, 10 * level + r) for r in (1, 2) for level in (1, 4)),
    *(one("compressed", r, level, 20 * level + r) for r in (1, 2) for level in (1, 4)),
    one("full", 1, 2.5, 7, mode="rate"),
]


def test_speed_and_memory_of_both_arms(tmp_path: Path) -> None:
    speeds, held = read_serving([written(tmp_path / "a.json", RESULTS, keep=0.25)])
    small = Case("adakv", 0.25)
    assert [(s.case, s.concurrency, s.tokens_per_second, s.repeats) for s in speeds] == [
        (Case("full"), 1, 11.5, 2),
        (small, 1, 21.5, 2),
        (Case("full"), 4, 41.5, 2),
        (small, 4, 81.5, 2),
    ]
    # At the highest concurrency; half of the 100 blocks that can hold something.
    assert [(h.case, h.seconds, h.held) for h in held] == [
        (Case("full"), (0.0, 2.0), (0.0, 500.0)),
        (small, (0.0, 2.0), (0.0, 500.0)),
    ]


def test_several_files_share_the_full_cache(tmp_path: Path) -> None:
    first = written(tmp_path / "a.json", RESULTS, keep=0.25)
    second = written(tmp_path / "b.json", RESULTS, keep=0.5, policy="uniform", window=16)
    speeds, held = read_serving([first, second])
    names = [s.case for s in speeds if s.concurrency == 1]
    assert names == [Case("full"), Case("adakv", 0.25), Case("uniform, window 16", 0.5)]
    assert len(held) == 3
    with pytest.raises(ValueError, match=r"b\.json: .*was measured in another file"):
        read_serving([first, written(tmp_path / "b.json", RESULTS, keep=0.25)])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {"kv": {}}, "held": []}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is no result of `uncomp bench serve`"):
        read_serving([tmp_path / "x.json"])
