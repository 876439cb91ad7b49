"""Rows of data sets on the Hugging Face hub: from a local folder, the hub's cache, or the hub.

A revision is a commit wherever one is known, so that everybody reads the same bytes; the hash of
what was read goes into the results either way.
"""

from __future__ import annotations

import hashlib
import json
import random
import zipfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from uncomp.eval.tasks.base import DataError, DataFile
from uncomp.eval.tasks.sources import INSTALL

Item = TypeVar("Item")

#: (data set, revision, file) -> SHA-256, for files whose hash independent projects publish alike
PUBLISHED: dict[tuple[str, str, str], str] = {
    ("zai-org/LongBench", "5e628be450b7e67fb7ae6e201bd6d8f7056f7672", "data.zip"): (
        "cb45b11a4133c6bc1d6a44b0f8e701335ff1e543195db1103472e575857f7f64"
    ),
    (
        "xinrongzhang2022/InfiniteBench",
        "90f0394333616266d9fe85824ceaf505093cbaa5",
        "longbook_qa_eng.jsonl",
    ): "7f53a3aabd5445fa29f168914f13569c348406cfc88a3e495f3f2c13a0966ca4",
}
_pins: dict[str, str] = {}
# Data sets the hub failed to give in this process: its client retries for 20 seconds each time.
_failed: dict[tuple[str, str], str] = {}


def pin(spec: str) -> None:
    """Read a data set at this revision from now on, in place of the one its task names.

    Args:
        spec: ``owner/name@revision``; a branch, a tag or, to be exact, a commit.

    Raises:
        ValueError: if there is no revision in it.
    """
    name, at, revision = spec.partition("@")
    if not (name and at and revision):
        raise ValueError(f"{spec!r} is not of the form owner/name@revision")
    _pins[name] = revision


def rows(
    name: str,
    file: str,
    revision: str = "main",
    folder: Path | None = None,
    *,
    member: str = "",
    licence: str = "see the data set's page",
) -> tuple[list[dict[str, Any]], DataFile]:
    """All rows of a JSON lines file, and what it was.

    A file in the local folder goes first: who puts it there means it. It lies at
    ``folder/NAME/FILE``, where NAME is the data set's name without its owner, or directly in
    ``folder/NAME``. Otherwise the hub's cache and the hub are asked.

    Args:
        name: data set on the hub, ``owner/name``; ``owner/name@revision`` overrides ``revision``.
        file: path in the data set.
        revision: commit, tag or branch; :func:`pin` overrides it.
        folder: local data folder (:attr:`Wanted.data <uncomp.eval.tasks.base.Wanted.data>`).
        member: path inside ``file``, if that is a zip archive. The hash is then the member's, so
            that a packed and an unpacked copy agree.
        licence: SPDX name, or what the publisher says.

    Raises:
        DataError: if the file is neither local nor to be had from the hub, if an archive's hash
            is not the published one, or if a line is not a JSON object.
    """
    name, _, given = name.partition("@")
    revision = given or _pins.get(name, revision)
    path = _local(name, file, folder, member)
    if path is None:
        path = _download(name, file, revision, folder, member)
        # The hub's cache lies at .../snapshots/COMMIT/FILE, also when a branch was asked for.
        commit = path.parts[path.parts.index("snapshots") + 1]
        origin = f"{name}@{commit}"
    else:
        commit, origin = revision, str(path)
    if path.name == PurePosixPath(file).name:
        _check_hash(path, PUBLISHED.get((name, commit, file)))
    content = _content(path, member)
    data = DataFile(
        name=PurePosixPath(member or file).name,
        sha256=hashlib.sha256(content).hexdigest(),
        licence=licence,
        origin=origin,
    )
    return _parse(content, data), data


def require(rows: Iterable[dict[str, Any]], fields: Sequence[str], data: DataFile) -> None:
    """Check that every row has these fields.

    Raises:
        DataError: naming the first row that lacks one.
    """
    for number, row in enumerate(rows, 1):
        missing = [field for field in fields if field not in row]
        if missing:
            raise DataError(
                f"{data.name} ({data.origin}): row {number} lacks {', '.join(missing)}; it has "
                f"{', '.join(row) or 'nothing'}. The file must be as its publisher distributes it"
            )


def pick(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """At most ``count`` items, drawn from the seed, in their old order.

    Drawn and not the first ones: rows of some files are sorted by difficulty.
    """
    if count >= len(items):
        return list(items)
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), count))]


def _places(name: str, file: str, folder: Path, member: str) -> list[Path]:
    """Where a local copy may lie, best first."""
    root = folder / name.rsplit("/", 1)[-1]
    wanted = member or file
    places = [root / wanted, root / PurePosixPath(wanted).name]
    return list(dict.fromkeys([*places, root / file] if member else places))


def _local(name: str, file: str, folder: Path | None, member: str) -> Path | None:
    if folder is None:
        return None
    return next((p for p in _places(name, file, folder, member) if p.is_file()), None)


def _download(name: str, file: str, revision: str, folder: Path | None, member: str) -> Path:
    """Path of a file in the hub's cache, after a download if need be."""
    try:
        from huggingface_hub import hf_hub_download
    except ModuleNotFoundError as error:
        raise DataError(f"the Python package 'huggingface_hub' is missing: {INSTALL}") from error
    key = (name, revision)
    try:
        return Path(
            hf_hub_download(
                name,
                file,
                repo_type="dataset",
                revision=revision,
                local_files_only=key in _failed,
            )
        )
    except (OSError, ValueError) as error:  # what the hub's client raises for every failure
        _failed.setdefault(key, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    places = _places(name, file, folder or Path("DIR"), member)
    given = "the data folder does not have it either" if folder else "no data folder was given"
    raise DataError(
        f"{member or file} of {name} cannot be had: the Hugging Face hub did not give it "
        f"({_failed[key]}), and {given}. Run once where huggingface.co can be reached, or download "
        f"https://huggingface.co/datasets/{name}/resolve/{revision}/{file} elsewhere and put it "
        f"at {' or '.join(str(place) for place in reversed(places))}"
        + ("" if folder else ", with DIR given as --data")
    )


def _check_hash(path: Path, published: str | None) -> None:
    if not published:
        return
    found = _file_hash(path, path.stat().st_mtime_ns)
    if found != published:
        raise DataError(
            f"{path} has SHA-256 {found}, but {published} is published for it: the "
            "download is damaged or the file another one. Delete it and get it again; to use "
            "another version on purpose, name its revision (owner/name@revision)"
        )


@cache
def _file_hash(path: Path, changed: int) -> str:
    """SHA-256 of a file; the time of its last change is there for the cache."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _content(path: Path, member: str) -> bytes:
    if not (member and path.suffix == ".zip"):
        return path.read_bytes()
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{path} is not a zip archive with {member} in it: {error}") from error


def _parse(content: bytes, data: DataFile) -> list[dict[str, Any]]:
    parsed = []
    # Only at newlines: str.splitlines also cuts at separators that JSON allows in strings.
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{data.name} ({data.origin}): line {number}: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{data.name} ({data.origin}): line {number} is not a JSON object")
        parsed.append(row)
    if not parsed:
        raise DataError(f"{data.name} ({data.origin}) has no rows")
    return parsed
