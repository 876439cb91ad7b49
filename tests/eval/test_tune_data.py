"""Rows of the user's: what becomes of them, and what is said where they cannot be used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from uncomp.eval.tune.data import OPEN, RowsError, read_rows


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "my.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_rows_become_samples(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"prompt": "Say é.", "references": "é"},
        "",
        {"context": "Long.", "question": "Why?", "answers": ["a", "b"], "metric": "f1"},
        {"prompt": "p", "id": "own", "system": "s", "max_tokens": 9, "facts": {"kind": 1}},
    )
    first, second, third = read_rows(path, max_tokens=5).samples
    assert (first.context, first.turns[0].question) == ("Say é.", "")
    assert (first.metric, first.turns[0].references) == ("contains", ("é",))
    assert (first.id, second.id, third.id) == ("1", "3", "own")
    assert (second.context, second.turns[0].question) == ("Long.", "\n\nWhy?")
    assert (second.metric, second.turns[0].references) == ("f1", ("a", "b"))
    assert (third.metric, third.system, third.facts) == (OPEN, "s", {"kind": 1})
    assert [s.turns[0].max_tokens for s in (first, second, third)] == [5, 5, 9]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_rows(path).file.sha256 == digest


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: must be an object"),
        ({"prompt": "p", "reference": "a"}, r"line 2: unknown fields \['reference'\]; allowed"),
        ({"question": "q"}, "line 2: give either prompt, or context and question"),
        ({"prompt": "p", "context": "c"}, "give either prompt"),
        ({"prompt": 3}, "prompt=3: must be text"),
        ({"prompt": "p", "references": []}, r"references=\[\]: must be text or a list"),
        ({"prompt": "p", "references": ["a", " "]}, "blank text is contained in every answer"),
        ({"prompt": "p", "references": "a", "answers": "a"}, "give one of them"),
        ({"prompt": "p", "metric": "f1"}, "a metric needs references"),
        ({"prompt": "p", "references": "a", "metric": "best"}, "no metric 'best'; there are"),
        ({"prompt": "p", "max_tokens": 0}, "max_tokens=0: must be a whole number"),
        ({"prompt": "p", "id": 1.5}, r"id=1\.5: must be text"),
        ({"prompt": "p", "id": "1"}, "id '1' is that of an earlier row"),
        ({"prompt": "p", "facts": 1}, "facts=1: must be an object"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, row: Any, says: str) -> None:
    with pytest.raises(RowsError, match=says):
        read_rows(write(tmp_path, {"prompt": "p"}, row))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RowsError, match="has no rows"):
        read_rows(write(tmp_path, ""))
    with pytest.raises(RowsError, match="cannot read"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(RowsError, match="no metric 'best'"):
        read_rows(write(tmp_path, {"prompt": "p"}), metric="best")
