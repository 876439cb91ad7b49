"""The chosen settings as the YAML file of ``uncomp serve MODEL --kv-config FILE``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from uncomp.config import UncompConfig
from uncomp.eval.tune.race import Outcome


def write_settings(path: Path, chosen: Outcome, notes: Sequence[str]) -> None:
    """Write the settings under what was measured, and read them back.

    Args:
        path: file.
        chosen: what is written.
        notes: comment lines.

    Raises:
        ValueError: what was written is not the setting that was measured.
    """
    # All that was searched stands there, defaults too: a later version may have others.
    settings = {"keep": chosen.setting.keep, **chosen.setting.settings()}
    comments = [f"# {' '.join(note.split())}\n" for note in notes]
    text = "".join(comments) + yaml.safe_dump(settings, sort_keys=False)
    if UncompConfig.from_mapping(yaml.safe_load(text)) != chosen.setting.config():
        raise ValueError(f"{path}: the settings read back are not those of {chosen.setting.name}")
    path.write_text(text, encoding="utf-8")
