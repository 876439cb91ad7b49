"""Flags, YAML file and additional config: who wins, and what is refused."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from uncomp.cli import settings
from uncomp.config import UncompConfig


def parse(*argv: str, below: dict[str, Any] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    settings.add_flags(parser)
    return settings.merge(parser.parse_args(settings.normalized(list(argv))), below or {})


@pytest.fixture
def yaml_file(tmp_path: Path) -> str:
    path = tmp_path / "kv.yaml"
    path.write_text("keep: 0.5\nsinks: 16\nreverse: true\nrecompact_every: 1024\ngroups: 4\n")
    return str(path)


def test_every_setting_has_a_flag_with_help() -> None:
    parser = argparse.ArgumentParser(prog="x")
    settings.add_flags(parser)
    flags = {option for action in parser._actions for option in action.option_strings}
    wanted = {settings.flag(f.name) for f in dataclasses.fields(UncompConfig)}
    assert wanted <= flags
    assert all(action.help for action in parser._actions)
    assert "--no-kv-reverse" in flags


def test_nothing_given_is_nothing() -> None:
    assert parse() == {}


def test_flags_are_typed() -> None:
    given = parse("--kv-keep", "0.25", "--kv-window=16", "--kv-policy", "uniform", "--kv-reverse")
    assert given == {"keep": 0.25, "window": 16, "policy": "uniform", "reverse": True}


def test_what_is_not_about_the_cache_has_no_kv_in_its_name() -> None:
    given = parse("--prefill-keep", "0.5", "--prefill_stages=3,9", "--kv-keep=1")
    assert given == {"prefill_keep": 0.5, "prefill_stages": "3,9", "keep": 1.0}
    assert settings.validate(given).prefill_keep == 0.5


@pytest.mark.parametrize("spelling", ["--kv_min_tokens", "--kv-min_tokens", "--kv-min-tokens"])
def test_underscores_are_accepted(spelling: str) -> None:
    assert parse(f"{spelling}=64") == {"min_tokens": 64}
    assert parse(spelling, "64") == {"min_tokens": 64}


def test_vllms_own_kv_flags_are_left_alone() -> None:
    argv = ["--kv_cache_dtype", "auto", "--kv-cache-memory-bytes=1"]
    assert settings.normalized(argv) == argv


def test_flag_wins_over_file_wins_over_additional_config(yaml_file: str) -> None:
    given = parse("--kv-config", yaml_file, "--kv-sinks", "2", below={"sinks": 1, "pooling": 7})
    assert given["sinks"] == 2
    assert given["groups"] == 4
    assert given["pooling"] == 7


def test_falsy_flags_win(yaml_file: str) -> None:
    given = parse(
        "--kv-config", yaml_file, "--kv-sinks", "0", "--no-kv-reverse", "--kv-recompact-every=0"
    )
    assert (given["sinks"], given["reverse"], given["recompact_every"]) == (0, False, 0)


def test_budget_flag_takes_the_ratio_of_the_file_back(yaml_file: str) -> None:
    given = parse("--kv-config", yaml_file, "--kv-budget", "512")
    assert "keep" not in given
    assert settings.validate(given).budget == 512


def test_both_on_one_level_is_an_error() -> None:
    with pytest.raises(settings.SettingsError, match="exactly one"):
        settings.validate(parse("--kv-keep", "0.5", "--kv-budget", "512"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--kv-keep RATIO"),
        ({"keep": 0.0}, r"in \(0, 1\]"),
        ({"keep": 1.5}, r"in \(0, 1\]"),
        ({"keep": float("nan")}, r"in \(0, 1\]"),
        ({"keep": "much"}, "type float"),
        ({"budget": 3}, "at least 36"),
        ({"keep": 0.5, "policy": "magic"}, "one of"),
        ({"keep": 0.5, "pooling": 4, "pooling_kind": "max"}, "odd"),
        ({"keep": 0.5, "windows": 4}, "unknown uncomp setting"),
        ({"keep": 0.5, "policy": "entropy", "calibration": "missing.json"}, "missing.json"),
        ({"keep": 0.5, "policy": "entropy", "source": "queries"}, "calibration"),
    ],
    ids=lambda value: str(value)[:32],
)
def test_bad_settings_say_what_is_allowed(given: dict[str, Any], message: str) -> None:
    with pytest.raises(settings.SettingsError, match=message):
        settings.validate(given)


@pytest.mark.parametrize(
    ("content", "message"),
    [("- 1\n- 2\n", "must hold settings"), ("keep: [", "cannot read"), (None, "cannot read")],
    ids=["list", "not-yaml", "missing"],
)
def test_bad_file(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "kv.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(settings.SettingsError, match=message):
        parse("--kv-config", str(path))


def test_empty_file_sets_nothing(tmp_path: Path) -> None:
    (tmp_path / "kv.yaml").write_text("")
    assert parse("--kv-config", str(tmp_path / "kv.yaml")) == {}
