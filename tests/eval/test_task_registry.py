"""The registry: names, families, and that it loads nothing heavy."""

import subprocess
import sys

import pytest

from uncomp.eval.tasks import registry


def test_names_are_unique_and_shaped_like_family_and_task() -> None:
    assert len(registry.TASKS) == sum(len(module.TASKS) for module in registry._MODULES)
    for name, task in registry.TASKS.items():
        assert name == task.name
        assert name.count("/") <= 1
        assert all((task.about, task.source, task.licence))


def test_a_family_is_all_its_tasks_each_once() -> None:
    found = [task.name for task in registry.find(["ruler/vt", "needle", "ruler"])]
    assert found[:2] == ["ruler/vt", "needle"]
    assert len(found) == len(set(found)) == 14


@pytest.mark.parametrize(
    ("name", "listed"), [("ruler/niah", "ruler/niah_single_1, "), ("rules", "ruler, needle, ")]
)
def test_an_unknown_name_lists_what_is_there(name: str, listed: str) -> None:
    with pytest.raises(ValueError, match=f"no task or family '{name}'; there are {listed}"):
        registry.find(["needle", name])


def test_importing_it_loads_nothing_heavy() -> None:
    code = (
        "import sys, uncomp.eval.tasks.registry; "
        "print(*{'torch', 'vllm', 'lm_eval', 'transformers', 'numpy', 'nltk', 'datasets'}"
        ".intersection(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
