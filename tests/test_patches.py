"""Every patch fits the installed vLLM, comes off again, and says so when it does not fit."""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("vllm")

from uncomp.patches import ledger
from uncomp.patches.apply import PATCHES, apply_all, apply_entry
from uncomp.patches.patch import Patch, PatchError


def installed(patch: Patch) -> Callable[..., Any]:
    """What vLLM would call now."""
    owner, attribute = patch._locate()
    return getattr(owner, attribute)


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """vLLM as installed before a test, and as it was found afterwards."""
    before = [patch.applied() for patch in PATCHES]
    for patch in PATCHES:
        patch.revert()
    yield
    for patch, applied in zip(PATCHES, before, strict=True):
        patch.revert()
        if applied:
            patch.apply()


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that stands for another version of vLLM."""
    made = ModuleType("other_vllm")
    monkeypatch.setitem(sys.modules, "other_vllm", made)
    return made


EACH = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)


@EACH
def test_applies_once_and_reverts(patch: Patch) -> None:
    original = installed(patch)
    assert not patch.applied()
    patch.apply()
    wrapped = installed(patch)
    assert patch.applied()
    assert wrapped is not original
    assert inspect.unwrap(wrapped) is original
    patch.apply()
    assert installed(patch) is wrapped
    assert patch.check() is original
    patch.revert()
    assert installed(patch) is original
    assert not patch.applied()
    patch.revert()
    assert installed(patch) is original


@EACH
def test_takes_every_call_that_vllm_may_make(patch: Patch) -> None:
    given = inspect.signature(patch.check()).parameters.values()
    own = inspect.signature(patch.wrap(patch.check()))
    positional = [p for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    own.bind(*positional, **{p.name: p for p in given if p.kind == p.KEYWORD_ONLY})
    names = {p.name: p for p in given if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    own.bind(**names)


@EACH
def test_missing_module_is_named(patch: Patch) -> None:
    broken = dataclasses.replace(patch, module="vllm.no_such_module")
    for act in (broken.check, broken.apply, broken.applied, broken.revert):
        with pytest.raises(PatchError, match=rf"vllm\.no_such_module\.{patch.symbol}"):
            act()


@EACH
def test_missing_symbol_is_named(patch: Patch, module: ModuleType) -> None:
    broken = dataclasses.replace(patch, module="other_vllm")
    with pytest.raises(PatchError, match=rf"{patch.name}.* other_vllm\.{patch.symbol} does not"):
        broken.apply()


@EACH
def test_another_signature_is_named(patch: Patch, module: ModuleType) -> None:
    """The function is there, but lost the parameters that the wrapper relies on."""
    *classes, function = patch.symbol.split(".")
    owner: Any = module
    for name in classes:
        setattr(owner, name, type(name, (), {}))
        owner = getattr(owner, name)

    def renamed(other: object) -> object:
        return other

    setattr(owner, function, renamed)
    broken = dataclasses.replace(patch, module="other_vllm")
    if not patch.parameters:
        broken.check()
        return
    with pytest.raises(PatchError, match=rf"other_vllm\.{patch.symbol} has parameters \['other'\]"):
        broken.apply()
    assert getattr(owner, function) is renamed


@pytest.mark.parametrize(
    "patch", [p for p in PATCHES if len(p.parameters) > 1], ids=lambda patch: patch.name
)
def test_parameters_in_another_order_do_not_fit(patch: Patch) -> None:
    broken = dataclasses.replace(patch, parameters=patch.parameters[::-1])
    with pytest.raises(PatchError, match="has parameters"):
        broken.check()


def test_nothing_is_installed_unless_everything_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = dataclasses.replace(PATCHES[-1], symbol="no_such_function")
    monkeypatch.setattr("uncomp.patches.apply.PATCHES", (*PATCHES[:-1], broken))
    with pytest.raises(PatchError, match="no_such_function"):
        apply_all()
    assert not any(patch.applied() for patch in PATCHES)


def test_entry_installs_only_the_switch() -> None:
    apply_entry()
    assert [patch.name for patch in PATCHES if patch.applied()] == ["engine-config"]
    apply_all()
    assert all(patch.applied() for patch in PATCHES)


@EACH
def test_ledger_has_no_gaps(patch: Patch) -> None:
    for field in ("name", "module", "symbol", "why", "upstream", "remove_when"):
        assert getattr(patch, field).strip(), field
    assert len(patch.why) > 40


def test_names_and_targets_are_unique() -> None:
    assert len({patch.name for patch in PATCHES}) == len(PATCHES)
    assert len({patch.target for patch in PATCHES}) == len(PATCHES)


def test_every_patch_file_is_in_the_ledger(root: Path) -> None:
    other = {"__init__", "apply", "ledger", "patch"}
    files = {path.stem for path in (root / "patches").glob("*.py")} - other
    assert files == {patch.name.replace("-", "_") for patch in PATCHES}


def test_readme_is_up_to_date() -> None:
    written = ledger.README.read_text(encoding="utf-8")
    assert written == ledger.table(), "run python -m uncomp.patches.ledger"
