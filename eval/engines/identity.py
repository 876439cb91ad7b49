"""Which model it is that answers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any


def identity(model: str, revision: str | None) -> dict[str, Any]:
    """Name and revision of a model for results.

    Args:
        model: hub name, or a folder, whose weights are hashed (seconds per gigabyte): folders have
            no revision, and their paths mean nothing elsewhere.
        revision: of the hub model, as far as it is known.

    Returns:
        ``model`` and ``revision``.
    """
    folder = Path(model)
    if not folder.is_dir():
        return {"model": model, "revision": revision}
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return {"model": folder.resolve().name, "revision": f"weights sha256 {digest.hexdigest()}"}
