"""The vLLM symbols uncomp relies on exist, with the parameters it relies on."""

import importlib.util
import os
from pathlib import Path

import pytest

from uncomp.engine import compat


def _packages() -> list[Path]:
    """The installed vLLM, and unpacked ones in UNCOMP_VLLM_SOURCES (see `make contract`)."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    found = [Path(spec.submodule_search_locations[0])]
    if folder := os.environ.get("UNCOMP_VLLM_SOURCES"):
        found += sorted(path / "vllm" for path in Path(folder).iterdir())
    return found


@pytest.mark.parametrize("package", _packages(), ids=lambda p: p.parent.name)
def test_every_symbol_of_the_contract_exists(package: Path) -> None:
    assert compat.broken_symbols(package) == []


def test_a_missing_symbol_and_a_missing_parameter_are_named(tmp_path: Path) -> None:
    package = _packages()[0]
    target = "v1/core/block_pool.py"
    (tmp_path / target).parent.mkdir(parents=True)
    source = (package / target).read_text()
    assert "def evict_blocks(self, block_ids" in source
    changed = source.replace("def evict_blocks(self, block_ids", "def evict_blocks(self, blocks")
    changed = changed.replace("def get_num_free_blocks", "def get_number_of_free_blocks")
    (tmp_path / target).write_text(changed)
    problems = [p for p in compat.broken_symbols(tmp_path) if p.startswith(target)]
    assert problems == [
        f"{target}: BlockPool.get_num_free_blocks does not exist",
        f"{target}: BlockPool.evict_blocks has no block_ids",
    ]


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0", "0.32.1+cpu", "0.33.9", "0.33.0rc1"])
def test_supported_versions_pass(version: str) -> None:
    compat.check_version(version)


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0.0", "dev"])
def test_other_versions_are_refused_by_name(version: str) -> None:
    with pytest.raises(compat.VersionError, match=version):
        compat.check_version(version)
