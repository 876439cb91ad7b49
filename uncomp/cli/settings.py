"""The `--kv-*` flags, made from the fields of :class:`uncomp.config.UncompConfig`.

Precedence: flag, then YAML file, then ``--additional-config``, then default.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uncomp.config import PRESETS, UncompConfig

#: Exclusive settings: naming one at a higher level takes the other of a lower level back.
_EXCLUSIVE = {"keep": "budget", "budget": "keep"}
_METAVARS = {
    "float": "X",
    "int": "N",
    "str": "TEXT",
    "calibration": "FILE",
    "trace": "FOLDER",
    "prefill_stages": "LAYERS",
}


class SettingsError(ValueError):
    """The settings given are not usable; the message says what is allowed."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per setting, and ``--kv-config``. Flags that are not given leave no trace."""
    group = parser.add_argument_group(
        "compression", "give --kv-keep or --kv-budget; everything else has a good default"
    )
    for f in dataclasses.fields(UncompConfig):
        kind = str(f.type).split("|")[0].strip()
        shown = "" if f.default is None else f" (default: {f.default})"
        options: dict[str, Any] = {
            "dest": f"kv_{f.name}",
            "default": argparse.SUPPRESS,
            "help": (f.metadata["help"] + shown).replace("%", "%%"),
        }
        if kind == "bool":
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = {"float": float, "int": int, "str": str}[kind]
            options["metavar"] = _METAVARS.get(f.name, _METAVARS[kind])
        group.add_argument(flag(f.name), **options)
    group.add_argument(
        "--kv-config",
        metavar="FILE",
        help="YAML file with the same settings (`keep: 0.25`, `min_tokens: 512`, ...); flags win",
    )


def flag(name: str) -> str:
    """The command-line flag of a setting: ``min_tokens`` -> ``--kv-min-tokens``.

    Those of the prefill are not about the KV cache: ``prefill_keep`` -> ``--prefill-keep``.
    """
    prefix = "--" if name.startswith("prefill_") else "--kv-"
    return prefix + name.replace("_", "-")


def normalized(argv: list[str]) -> list[str]:
    """Our flags spelled with underscores (``--kv_min_tokens``) as vLLM allows for its own."""
    names = {flag(f.name) for f in dataclasses.fields(UncompConfig)} | {"--kv-config"}
    result = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        dashed = name.replace("_", "-")
        known = dashed in names or dashed.replace("--no-", "--", 1) in names
        result.append(dashed + equals + value if known else argument)
    return result


def merge(args: argparse.Namespace, below: Mapping[str, Any]) -> dict[str, Any]:
    """The settings given, by precedence, not yet validated.

    Args:
        args: parsed by a parser with :func:`add_flags`.
        below: settings of lower precedence, ``additional_config["uncomp"]``.

    Raises:
        SettingsError: the YAML file cannot be read or is no mapping.
    """
    merged = dict(below)
    flags = {
        f.name: getattr(args, f"kv_{f.name}")
        for f in dataclasses.fields(UncompConfig)
        if hasattr(args, f"kv_{f.name}")
    }
    for level in (read_yaml(args.kv_config) if args.kv_config else {}, flags):
        for name, other in _EXCLUSIVE.items():
            if level.get(name) is not None and level.get(other) is None:
                merged.pop(other, None)
        merged.update(level)
    return merged


def validate(settings: Mapping[str, Any]) -> UncompConfig:
    """Check settings as the engine will, before it is loaded.

    Raises:
        SettingsError: naming the setting, what is allowed and its flag.
    """
    if settings.get("keep") is None and settings.get("budget") is None:
        raise SettingsError(
            "say how much to keep: --kv-keep RATIO (e.g. --kv-keep 0.25) or --kv-budget TOKENS "
            "(per KV head; --kv-keep 1: all of it, e.g. to prune prompts only); to serve without "
            "compression use `vllm serve`"
        )
    try:
        config = UncompConfig.from_mapping(settings)
        is_read = config.uses_entropy or config.shares == "calibrated"
        if config.calibration is not None and is_read:
            from uncomp.calibration.file import load

            calibration = load(config.calibration)
            if config.shares == "calibrated":
                calibration.head_importance()
    except ValueError as error:
        raise SettingsError(f"{error} (flags: --kv-NAME, see --help)") from error
    return config


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        SettingsError: missing file, not YAML, or not a mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"cannot read {path}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold settings such as `keep: 0.25`, got {content!r}")
    return content


def choices_help() -> str:
    """The policies and presets by name (loads torch)."""
    from uncomp.policies import NAMES

    return f"policies: {', '.join(NAMES)}; presets: {', '.join(PRESETS)}"
