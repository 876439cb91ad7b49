"""Environment variables."""

import tempfile
from pathlib import Path

import pytest

from uncomp import envs


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, False),
        ("", False),
        ("0", False),
        ("No", False),
        (" off ", False),
        ("1", True),
        ("TRUE", True),
        (" yes", True),
        ("on", True),
    ],
)
def test_disabled(monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool) -> None:
    monkeypatch.delenv("UNCOMP_DISABLE", raising=False)
    if value is not None:
        monkeypatch.setenv("UNCOMP_DISABLE", value)
    assert envs.disabled() is expected


@pytest.mark.parametrize("value", ["2", "maybe", "disabled"])
def test_a_kill_switch_that_says_neither_is_an_error(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("UNCOMP_DISABLE", value)
    with pytest.raises(ValueError, match=f"UNCOMP_DISABLE='{value}': use one of"):
        envs.disabled()


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("UNCOMP_CACHE", raising=False)
    assert envs.cache_dir() == tmp_path / ".cache" / "uncomp"
    monkeypatch.setenv("UNCOMP_CACHE", "")
    assert envs.cache_dir() == tmp_path / ".cache" / "uncomp"
    monkeypatch.setenv("UNCOMP_CACHE", "/elsewhere")
    assert envs.cache_dir() == Path("/elsewhere")


def test_metrics_dir_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNCOMP_METRICS_DIR", raising=False)
    folder = envs.metrics_dir()
    assert folder.parent == Path(tempfile.gettempdir())
    assert folder.name.startswith("uncomp-metrics-")
    monkeypatch.setenv("UNCOMP_METRICS_DIR", "/shared")
    assert envs.metrics_dir() == Path("/shared")


def test_vllm_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert envs.vllm_plugins() is None
    monkeypatch.setenv("VLLM_PLUGINS", "uncomp, other")
    assert envs.vllm_plugins() == ["uncomp", "other"]
    monkeypatch.setenv("VLLM_PLUGINS", "")
    assert envs.vllm_plugins() == [""]


def test_published_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNCOMP_INSTANCE", "before")
    assert envs.published_instance() == "before"
    envs.publish_instance("engine-1")
    assert envs.published_instance() == "engine-1"
    monkeypatch.delenv("UNCOMP_INSTANCE")
    assert envs.published_instance() is None


def test_every_variable_is_documented(root: Path) -> None:
    source = (root / "uncomp" / "envs.py").read_text(encoding="utf-8")
    names = {line.split('"')[1] for line in source.splitlines() if "os.environ" in line}
    head = source.split('"""')[1]
    assert {name for name in names if name not in head and name != "VLLM_PLUGINS"} == set()
