"""Rows of data sets: local copies, the hub's cache, and what is said when there is neither."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import constants

from uncomp.eval.tasks import hub
from uncomp.eval.tasks.base import DataError

ROWS = [{"id": 0, "text": "two\u2028lines, one row"}, {"id": 1, "text": "naïve"}]
CONTENT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path) -> Path:
    """No network, an empty hub cache (returned), and nothing remembered from other tests."""
    cache = tmp_path / "hub-cache"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hub, "_failed", {})
    monkeypatch.setattr(hub, "_pins", {})
    return cache


def write(path: Path, content: bytes = CONTENT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def cached(cache: Path, commit: str, branch: str, content: bytes = CONTENT) -> None:
    """A file in the hub client's own cache layout."""
    repository = cache / "datasets--owner--Set"
    write(repository / "refs" / branch, commit.encode())
    write(repository / "snapshots" / commit / "part" / "a.jsonl", content)


@pytest.mark.parametrize("place", ["Set/part/a.jsonl", "Set/a.jsonl"])
def test_local_file(tmp_path, place):
    path = write(tmp_path / place)
    rows, data = hub.rows("owner/Set", "part/a.jsonl", folder=tmp_path, licence="MIT")
    assert rows == ROWS
    assert (data.name, data.sha256, data.licence) == ("a.jsonl", SHA256, "MIT")
    assert data.origin == str(path)


def test_local_file_goes_before_the_cache(tmp_path, offline):
    cached(offline, COMMIT, "main", b'{"id": 7}\n')
    write(tmp_path / "Set/a.jsonl")
    assert hub.rows("owner/Set", "part/a.jsonl", folder=tmp_path)[0] == ROWS


def test_packed_and_unpacked_agree(tmp_path):
    packed, unpacked = tmp_path / "packed", tmp_path / "unpacked"
    (packed / "Set").mkdir(parents=True)
    with zipfile.ZipFile(packed / "Set" / "data.zip", "w") as archive:
        archive.writestr("data/a.jsonl", CONTENT)
    write(unpacked / "Set" / "data" / "a.jsonl")
    (first, one), (second, other) = (
        hub.rows("owner/Set", "data.zip", folder=folder, member="data/a.jsonl")
        for folder in (packed, unpacked)
    )
    assert first == second == ROWS
    assert one.sha256 == other.sha256 == SHA256
    assert one.name == other.name == "a.jsonl"


def test_archive_without_the_member(tmp_path):
    (tmp_path / "Set").mkdir()
    with zipfile.ZipFile(tmp_path / "Set" / "data.zip", "w") as archive:
        archive.writestr("data/b.jsonl", CONTENT)
    with pytest.raises(DataError, match=r"not a zip archive with data/a\.jsonl"):
        hub.rows("owner/Set", "data.zip", folder=tmp_path, member="data/a.jsonl")


def test_published_hash_is_checked(tmp_path, monkeypatch):
    write(tmp_path / "Set/a.jsonl")
    monkeypatch.setitem(hub.PUBLISHED, ("owner/Set", COMMIT, "a.jsonl"), SHA256)
    hub.rows("owner/Set", "a.jsonl", COMMIT, tmp_path)
    monkeypatch.setitem(hub.PUBLISHED, ("owner/Set", COMMIT, "a.jsonl"), "0" * 64)
    with pytest.raises(DataError, match=rf"SHA-256 {SHA256}, but 0{{64}} is published"):
        hub.rows("owner/Set", "a.jsonl", COMMIT, tmp_path)
    # Another version on purpose: nothing is published for it here.
    assert hub.rows("owner/Set@other", "a.jsonl", COMMIT, tmp_path)[0] == ROWS


def test_commit_of_a_branch_is_recorded(offline):
    cached(offline, COMMIT, "main")
    rows, data = hub.rows("owner/Set", "part/a.jsonl")
    assert rows == ROWS
    assert (data.sha256, data.origin) == (SHA256, f"owner/Set@{COMMIT}")


def test_pinned_revision(offline):
    other = COMMIT[::-1]
    cached(offline, COMMIT, "main", b'{"id": 7}\n')
    cached(offline, other, "v2")
    assert hub.rows("owner/Set@v2", "part/a.jsonl")[1].origin == f"owner/Set@{other}"
    assert hub.rows("owner/Set", "part/a.jsonl")[0] == [{"id": 7}]
    hub.pin(f"owner/Set@{other}")
    assert hub.rows("owner/Set", "part/a.jsonl")[0] == ROWS


@pytest.mark.parametrize("spec", ["owner/Set", "@main", "owner/Set@"])
def test_pin_needs_a_revision(spec):
    with pytest.raises(ValueError, match="owner/name@revision"):
        hub.pin(spec)


def test_neither_local_nor_hub(tmp_path):
    with pytest.raises(DataError) as caught:
        hub.rows("owner/Set", "data.zip", COMMIT, tmp_path, member="data/a.jsonl")
    message = str(caught.value)
    assert "data/a.jsonl of owner/Set cannot be had" in message
    assert f"https://huggingface.co/datasets/owner/Set/resolve/{COMMIT}/data.zip" in message
    for place in ("data.zip", "a.jsonl", "data/a.jsonl"):
        assert str(tmp_path / "Set" / place) in message
    with pytest.raises(
        DataError, match=r"no data folder was given.*DIR/Set/a\.jsonl, with DIR given as --data"
    ):
        hub.rows("owner/Set", "a.jsonl")


def test_hub_is_not_asked_again_after_a_failure(monkeypatch):
    asked = []

    def unreachable(*args, local_files_only, **kwargs):
        asked.append(local_files_only)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    for file in ("a.jsonl", "b.jsonl"):
        with pytest.raises(DataError, match="ConnectionError: Name or service not known"):
            hub.rows("owner/Set", file)
    assert asked == [False, True]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"id": 0}\n{"id":\n', "line 2: Expecting value"),
        (b"[1]\n", "line 1 is not a JSON object"),
        (b"\n", "has no rows"),
    ],
    ids=["broken", "no-object", "empty"],
)
def test_bad_files(tmp_path, content, complaint):
    write(tmp_path / "Set/a.jsonl", content)
    with pytest.raises(DataError, match=complaint):
        hub.rows("owner/Set", "a.jsonl", folder=tmp_path)


def test_missing_field_names_the_row(tmp_path):
    write(tmp_path / "Set/a.jsonl")
    rows, data = hub.rows("owner/Set", "a.jsonl", folder=tmp_path)
    hub.require(rows, ("id", "text"), data)
    del rows[1]["text"]
    with pytest.raises(DataError, match=r"a\.jsonl .*: row 2 lacks text; it has id"):
        hub.require(rows, ("id", "text"), data)


def test_pick_is_a_seeded_subset_in_order():
    items = list(range(100))
    chosen = hub.pick(items, 10, seed=1)
    assert len(chosen) == 10
    assert chosen == sorted(set(chosen))
    assert chosen == hub.pick(items, 10, seed=1)
    assert chosen != hub.pick(items, 10, seed=2)
    assert chosen != items[:10]
    assert hub.pick(items, 1000, seed=1) == items
