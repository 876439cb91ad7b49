"""The wheel holds the whole package under one name, and nothing shadows other packages."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # tomllib's origin, under its PyPI name; pytest depends on it there
    import tomli as tomllib

ROOMS = {
    "uncomp": "uncomp",
    "kernels": "uncomp.kernels",
    "patches": "uncomp.patches",
    "eval": "uncomp.eval",
}
ENGINE = (
    "uncomp.engine",
    "uncomp.patches",
    "uncomp.eval",
)  # may import vLLM when they are imported


def package_folders(root: Path) -> dict[str, Path]:
    """Every folder with Python files below the four rooms: {package name: folder}."""
    folders = {}
    for room, package in ROOMS.items():
        for folder in {path.parent for path in (root / room).rglob("*.py")}:
            parts = folder.relative_to(root / room).parts
            folders[".".join([package, *parts])] = folder
    return folders


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build in place would reuse what an older one left behind."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for room in ROOMS:
        shutil.copytree(root / room, source / room, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    out = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (path,) = out.glob("uncomp-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel installs."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_elsewhere(code: str, folder: Path, path: Path | None = None) -> str:
    """Run Python code in `folder`; `path` goes before the site packages. Returns stdout."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PYTHONPATH"] = str(path or "")
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_every_package_is_listed(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(package_folders(root))


def test_every_package_has_an_init(root: Path) -> None:
    # without it the editable install does not find packages that are mapped to another folder
    missing = [str(f) for f in package_folders(root).values() if not (f / "__init__.py").is_file()]
    assert missing == []


def test_every_module_and_data_file_is_in_the_wheel(root: Path, wheel: Path) -> None:
    expected = set()
    for package, folder in package_folders(root).items():
        data = folder.iterdir() if folder == root / "uncomp/data" else folder.glob("*.py")
        names = {path.name for path in data if path.is_file() and path.suffix != ".pyc"}
        expected |= {f"{package.replace('.', '/')}/{name}" for name in names}
    assert expected - set(zipfile.ZipFile(wheel).namelist()) == set()
    assert any(name.endswith(".txt") for name in expected)


def test_one_top_level_name(wheel: Path) -> None:
    # "kernels" is a Hugging Face package that transformers imports from when it is there
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"uncomp"}


def test_entry_points_and_licence(installed: Path) -> None:
    (metadata,) = installed.glob("uncomp-*.dist-info")
    entries = configparser.ConfigParser()
    entries.read(metadata / "entry_points.txt")
    assert dict(entries["console_scripts"]) == {"uncomp": "uncomp.cli:main"}
    assert dict(entries["vllm.general_plugins"]) == {"uncomp": "uncomp.plugin:register"}
    assert "Apache License" in (metadata / "licenses/LICENSE").read_text()


@pytest.mark.parametrize("target", ["uncomp.cli:main", "uncomp.plugin:register"])
def test_entry_point_targets_exist(target: str, installed: Path, tmp_path: Path) -> None:
    module, function = target.split(":")
    code = f"import {module} as m; print(callable(m.{function}), m.__file__)"
    callable_, file = run_elsewhere(code, tmp_path, installed).split()
    assert callable_ == "True"
    assert Path(file).is_relative_to(installed)


def test_packages_import_from_the_wheel(root: Path, installed: Path, tmp_path: Path) -> None:
    packages = sorted(p for p in package_folders(root) if not p.startswith(ENGINE))
    code = f"import importlib\nfor p in {packages}: print(importlib.import_module(p).__file__)"
    files = run_elsewhere(code, tmp_path, installed).splitlines()
    assert len(files) == len(packages)
    assert all(Path(file).is_relative_to(installed) for file in files)


@pytest.mark.parametrize("name", ["kernels", "patches", "eval"])
def test_nothing_of_ours_is_found_under_a_bare_name(name: str, root: Path, tmp_path: Path) -> None:
    code = f"import importlib.util as u; s = u.find_spec({name!r}); print(s and s.origin)"
    origin = run_elsewhere(code, tmp_path)
    assert not Path(origin).is_relative_to(root)


def test_bare_names_are_not_found_under_pytest(root: Path) -> None:
    # the root gets onto sys.path by `python -m pytest` or by an __init__.py in tests
    assert [path for path in sys.path if Path(path).resolve() == root] == []
    assert list((root / "tests").rglob("__init__.py")) == []
