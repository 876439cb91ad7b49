"""A report over made-up scores: what it says, that it says all of it, and that its files hold."""

import csv
import dataclasses
import json
import math
import random
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from uncomp.eval.report import Held, Throughput, write_report
from uncomp.eval.report.analysis import Analysis, analyse, best
from uncomp.eval.report.cases import Measure, grouped
from uncomp.eval.report.facts import data_hash, run_facts
from uncomp.eval.report.rows import COLUMNS, read_rows, rows, write_rows
from uncomp.eval.report.stats import Difference, Interval
from uncomp.eval.report.wording import difference_cell, number, signed
from uncomp.eval.run.records import Case, Scored

FULL, SNAP, OURS = Case("full"), Case("snapkv", 0.25), Case("uncomp", 0.25)
NASTY = "<script>alert('x')</script> | **bold** & `code`"
FACTS = {
    "model": NASTY,
    "data": [{"name": "essays <b>", "sha256": "ab" * 32, "licence": "CC0-1.0", "origin": "pkg 1"}],
    "methods": {"uncomp": {"window": 32, "note": "</pre><i>"}},
    "versions": {"vllm": "0.32.0"},
    "seeds": 7,
    "command": "uncomp eval --tasks 'a|b' <file>",
    "kv_bytes_per_token": 1024,
}


def score(
    task: str,
    sample: str,
    case: Case,
    value: float,
    turn: int = 0,
    metric: str = "match",
    **more: Any,
) -> Scored:
    base: dict[str, Any] = {
        "keep_measured": case.keep, "prompt_tokens": 100, "output_tokens": 10,
    }  # fmt: skip
    return Scored(task, sample, turn, case, metric, value, **{**base, **more})


def made_up(size: int = 24) -> list[Scored]:
    """Two families of accuracies, likelihoods, turns, needles; four cases, seeded."""
    rng = random.Random(0)
    chance = {FULL: 0.9, SNAP: 0.6, OURS: 0.8, Case("uncomp", 0.5): 0.85}
    found = []
    for index in range(size):
        for case, right in chance.items():
            facts = {"length": 4096, "depth": index % 4 / 3}
            value = float(rng.random() < right)
            found.append(score("ruler/a", f"a{index}", case, value, facts=facts))
            found.append(score("ruler/b", NASTY + str(index), case, float(rng.random() < right)))
            for turn in range(2):
                value = rng.random() * right
                found.append(score("qa", f"q{index}", case, value, turn, "f1", cut_tokens=index))
            likelihood = {"output_tokens": 0, "higher_is_better": False}
            value = 3 - right + rng.random()
            found.append(score("text", f"t{index}", case, value, 0, "nll", **likelihood))
            found.append(score("text", f"t{index}", case, right, 0, "agreement", output_tokens=0))
    return found


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse(made_up(), resamples=99)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    speed = [Throughput(case, n, 10.0 * n) for case in (FULL, OURS) for n in (1, 2)]
    held = [Held(OURS, (0.0, 1.0), (0.0, 2**20))]
    written = write_report(made_up(), FACTS, path, speed, held, resamples=99)
    assert {p for p in path.rglob("*") if p.is_file()} == set(written)
    return path


class Page(HTMLParser):
    """Text, links and whether every tag is closed in turn."""

    EMPTY = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.resources: list[str] = []
        self.anchors: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.alts: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        if tag == "img":
            self.alts.append(given["alt"])
        for name in ("src", "href", "srcset", "data", "poster"):
            if name in given:
                (self.anchors if tag == "a" else self.resources).append(given[name])
        if "id" in given:
            self.ids.append(given["id"])
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self.open else ""


def test_page_stands_alone(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert [link for link in page.resources if not link.startswith("data:image/svg+xml;")] == []
    assert len(page.resources) == len(list((folder / "plots").iterdir())) >= 6
    assert all(page.alts)
    assert not page.tags & {"script", "link", "iframe", "i", "object"}
    assert "@import" not in text
    assert "url(" not in text
    assert {anchor.removeprefix("#") for anchor in page.anchors} == set(page.ids)


def test_page_escapes_and_still_says_it(folder: Path) -> None:
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert NASTY in page.text
    assert "essays <b>" in page.text
    assert "</pre><i>" in page.text
    assert FACTS["command"] in page.text


def test_page_shows_every_case_task_and_fact(folder: Path, analysis: Analysis) -> None:
    text = Page((folder / "report.html").read_text(encoding="utf-8")).text
    for case in analysis.cases[1:]:
        assert f"{case.method}, keep {case.keep:g}: " in text
    for task in ("ruler/a", "ruler/b", "qa", "text"):
        assert f"{task}: " in text
    wanted = (
        "CC0-1.0",
        "ab" * 32,
        "0.32.0",
        "all tasks: score",
        "lower is better",
        "n = 24",
        "needles at keep 0.5",
    )
    for words in wanted:
        assert words in text
    assert text.count("not recorded") >= 4  # revision, machine, commit, date


def test_markdown_links_lead_to_files(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    links = re.findall(r"(?<!\\)\]\(([^)]+)\)", text)
    assert len(links) >= 6
    for link in links:
        assert (folder / unquote(link)).is_file(), link


def test_markdown_escapes(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    fenced = re.sub(r"^```\n.*?\n```$", "", text, flags=re.S | re.M)
    assert "<script>" not in fenced
    assert r"\<script\>" in fenced
    lines = [*fenced.splitlines(), ""]
    heads = [index for index, row in enumerate(lines) if row.startswith("|---")]
    assert heads
    for head in heads:
        columns, row = lines[head].count("|"), head - 1
        while lines[row].startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", lines[row])) == columns, lines[row]
            row += 1


def test_rows_come_back(folder: Path, analysis: Analysis, tmp_path: Path) -> None:
    found = rows(analysis, FACTS)
    again = read_rows(write_rows(found, tmp_path / "rows.csv"))
    assert len(again) == len(found) == len(analysis.macros) + len(analysis.results)
    for one, two in zip(found, again, strict=True):
        for name, value in dataclasses.asdict(one).items():
            expected = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert getattr(two, name) == expected
    assert (folder / "rows.csv").read_text() == (tmp_path / "rows.csv").read_text()


def test_rows_say_where_they_come_from(folder: Path) -> None:
    found = {(r.task, r.metric, r.method, r.keep): r for r in read_rows(folder / "rows.csv")}
    row = found["ruler/a", "match", "uncomp", 0.25]
    assert (row.n, row.full_n, row.snapkv_n, row.better) == (24, 24, 24, "higher")
    assert (row.seed, row.versions, row.keep_measured) == ("7", "vllm 0.32.0", 0.25)
    assert row.data == data_hash(FACTS, "ruler/a")
    assert found["text", "nll", "uncomp", 0.25].better == "lower"
    both = found["ruler", "score", "uncomp", 0.25]
    assert (row.over, row.tasks, both.over, both.tasks, both.n) == ("task", 1, "macro", 2, 48)
    assert found["ruler/a", "match", "full", 1.0].full_difference is None
    assert found["ruler/a", "match", "snapkv", 0.25].snapkv_difference is None


def test_rows_of_another_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(",".join([*COLUMNS[1:], "extra"]) + "\n")
    with pytest.raises(
        ValueError, match=r"missing columns \['task'\], unknown columns \['extra'\]"
    ):
        read_rows(path)


def test_flips_file_has_all_of_them(folder: Path, analysis: Analysis) -> None:
    with open(folder / "flips.csv", newline="") as file:
        found = list(csv.DictReader(file))
    counted = sum(len(f.lost) + len(f.gained) for f in analysis.flips)
    assert len(found) == counted > 0
    assert {row["metric"] for row in found} == {"match", "f1"}  # agreement is no verdict


def test_groups_keep_likelihoods_apart(analysis: Analysis) -> None:
    groups = {(g.name, g.metric): [m.task for m in g.measures] for g in analysis.groups}
    assert groups == {
        ("all tasks", "score"): ["qa", "ruler/a", "ruler/b"],
        ("qa", "score"): ["qa"],
        ("ruler", "score"): ["ruler/a", "ruler/b"],
        ("text", "agreement"): ["text"],
        ("text", "nll"): ["text"],
    }
    assert [g.name for g in grouped([Measure("a/x", "m"), Measure("a/y", "m")])] == ["a"]


def test_macro_average_by_hand() -> None:
    scored = [score("r/a", f"s{i}", FULL, 1.0) for i in range(6)]
    scored += [score("r/b", f"s{i}", FULL, 0.0) for i in range(2)]
    [macro] = analyse(scored, resamples=9).macros
    assert (macro.estimate.mean, macro.estimate.n) == (0.5, 8)


def test_best_lacks_no_task_and_is_not_the_full_cache() -> None:
    scored = []
    others = (Case("partial", 0.25), Case("alone", 0.5), Case("all", 1.0), FULL)
    for index, case in enumerate((SNAP, OURS, *others)):
        for task in ("r/a", "r/b"):
            if (case.method, task) != ("partial", "r/b"):
                scored += [score(task, f"s{i}", case, 0.1 * index) for i in range(3)]
    winners = {case for _, case in best(analyse(scored, resamples=9).macros)}
    assert winners == {OURS}  # partial is better but lacks a task; alone and all have no rival


def test_lower_is_better_marks_the_lowest(analysis: Analysis) -> None:
    winners = {(g.metric, case) for g, case in best(analysis.macros)}
    assert ("nll", OURS) in winners


@pytest.mark.parametrize(
    ("higher", "low", "high", "mark"),
    [
        (False, 0.5, 1.5, "down"),
        (True, 0.5, 1.5, "up"),
        (False, -1.5, -0.5, "up"),
        (True, -1.5, -0.5, "down"),
        (True, -0.5, 1.5, ""),
    ],
)
def test_marks_say_better_or_worse(higher: bool, low: float, high: float, mark: str) -> None:
    ends = Interval(low, high, "BCa")
    found = Difference(9, 1, 0.0, 0.0, (low + high) / 2, ends, 1, 1, 1.0, 0, 0)
    assert difference_cell(found, higher).mark == mark


def test_notes_say_what_is_missing() -> None:
    scored = made_up(4)
    scored = [s for s in scored if not (s.case == OURS and s.task == "ruler/b")]
    scored = [s for s in scored if not (s.case == SNAP and s.sample == "q1" and s.turn == 1)]
    scored.append(score("ruler/a", "bad", OURS, math.nan))
    scored.append(score("ruler/a", "silent", OURS, 1.0, keep_measured=None))
    notes = " ".join(analyse(scored, resamples=9).notes)
    assert "Values that are not finite are left out: ruler/a match (1)." in notes
    assert (
        "Tasks not run in some cases, whose means over tasks lack them: ruler/b: uncomp at 0.25"
        in notes
    )
    assert "qa: snapkv at 0.25 (1 missing)" in notes
    assert "SnapKV was not run at keep 0.5" in notes
    assert "Fewer than 20 samples" in notes
    assert "did not say what it kept in 1 of 4 cases" in notes


def test_without_the_full_cache_the_report_still_comes(tmp_path: Path) -> None:
    scored = [s for s in made_up(2) if s.case == OURS and s.task == "ruler/a"]
    files = write_report(scored, {}, tmp_path, resamples=9)
    assert "The full cache was not run" in files[0].read_text()
    assert all(path.is_file() for path in files)


def test_one_sample_has_no_interval(tmp_path: Path) -> None:
    files = write_report([score("a", "s", FULL, 1.0)], {}, tmp_path, resamples=9)
    assert "no interval: one sample" in files[0].read_text()


@pytest.mark.parametrize(
    ("scored", "message"),
    [
        ([], "nothing to report: 0 scores"),
        ([score("a", "s", FULL, math.nan)], "nothing to report: 1 scores"),
        ([score("a", "s", FULL, 1.0)] * 2, "a s turn 0 has match twice"),
    ],
    ids=["empty", "not finite", "twice"],
)
def test_refused(scored: list[Scored], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        analyse(scored)


@pytest.mark.parametrize(
    ("value", "higher", "text", "with_sign"),
    [
        (0.7123, True, "71.2", "+71.2"),
        (-0.0001, True, "0.0", "0.0"),
        (-0.031, True, "\N{MINUS SIGN}3.1", "\N{MINUS SIGN}3.1"),
        (0.04, False, "0.0400", "+0.0400"),
        (123.4, False, "123", "+123"),
    ],
)
def test_numbers(value: float, higher: bool, text: str, with_sign: str) -> None:
    assert (number(value, higher), signed(value, higher)) == (text, with_sign)


def test_facts_that_nobody_knows_are_shown_too() -> None:
    shown = dict(run_facts({"model": "m", "prefix_caching": True, "machine": {"gpu": "x", "n": 2}}))
    assert (shown["model"], shown["prefix caching"], shown["machine"]) == (
        "m",
        "True",
        "gpu x, n 2",
    )
    assert shown["commit"] == "not recorded"


def test_data_hash_is_of_the_files_of_the_task() -> None:
    one, two = {"name": "a", "sha256": "1", "tasks": ["x"]}, {"name": "b", "sha256": "2"}
    facts = json.loads(json.dumps({"data": [one, two]}))
    assert data_hash(facts, "x") == data_hash({"data": [two, one]})
    assert data_hash(facts, "y") == data_hash({"data": [two]}) != data_hash(facts, "x")
    assert data_hash({}) == ""
