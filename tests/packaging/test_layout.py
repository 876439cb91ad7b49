"""Who may import whom, and what no file may contain."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOMS = ("uncomp", "kernels", "patches", "eval")
# What drives the engine. uncomp/cli may too, but inside functions: `--help` must not load vLLM.
ENGINE_FOLDERS = ("uncomp/engine", "patches", "eval")
LAZY_FOLDERS = ("uncomp/cli", "uncomp/plugin.py")
BINARY = {".pyc", ".png", ".safetensors"}


def files(root: Path) -> list[str]:
    paths = (path for room in ROOMS for path in (root / room).rglob("*.py"))
    return sorted(path.relative_to(root).as_posix() for path in paths)


def below(file: str, folders: tuple[str, ...]) -> bool:
    return any(file == folder or file.startswith(folder + "/") for folder in folders)


def module_name(file: str) -> str:
    """`kernels/gram/naive.py` -> `uncomp.kernels.gram.naive`; `__init__` is kept as a last part."""
    name = file.removesuffix(".py").replace("/", ".")
    return name if name.startswith("uncomp.") else f"uncomp.{name}"


def imports(root: Path, file: str, nested: bool = True) -> set[str]:
    """Absolute names of the modules that a file imports (with the names taken from them).

    `nested`: also inside functions. `if TYPE_CHECKING:` blocks are left out, they do not run.
    """
    package = module_name(file).rpartition(".")[0]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            found.update(f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        elif nested or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse((root / file).read_text(encoding="utf-8")))
    return found


def imports_any(root: Path, file: str, modules: tuple[str, ...], nested: bool = True) -> bool:
    names = imports(root, file, nested)
    return any((name + ".").startswith(module + ".") for name in names for module in modules)


def test_only_the_engine_imports_vllm(root: Path) -> None:
    others = [f for f in files(root) if not below(f, ENGINE_FOLDERS + LAZY_FOLDERS)]
    assert [f for f in others if imports_any(root, f, ("vllm",))] == []


def test_cli_and_plugin_import_vllm_inside_functions(root: Path) -> None:
    lazy = [f for f in files(root) if below(f, LAZY_FOLDERS)]
    assert [f for f in lazy if imports_any(root, f, ("vllm",), nested=False)] == []


def test_method_does_not_know_the_engine(root: Path) -> None:
    method = [f for f in files(root) if not below(f, ENGINE_FOLDERS + LAZY_FOLDERS)]
    above = ("uncomp.engine", "uncomp.patches", "uncomp.eval", "uncomp.cli", "uncomp.plugin")
    assert [f for f in method if imports_any(root, f, above)] == []


def test_kernels_import_tensor_libraries_only(root: Path) -> None:
    allowed = sys.stdlib_module_names | {"torch", "triton", "numpy"}
    found = {}
    for file in files(root):
        if below(file, ("kernels",)):
            names = {n for n in imports(root, file) if n.split(".")[0] not in allowed}
            found[file] = {n for n in names if not n.startswith("uncomp.kernels.")}
    assert {file: names for file, names in found.items() if names} == {}


def test_rooms_are_imported_under_the_package_name(root: Path) -> None:
    # `import kernels` works by accident where the root is on sys.path, and finds others' elsewhere
    tests = [p.relative_to(root).as_posix() for p in (root / "tests").rglob("*.py")]
    bare = ("kernels", "patches", "eval")
    assert [f for f in files(root) + tests if imports_any(root, f, bare)] == []


def loaded_after(modules: list[str], watched: set[str], folder: Path) -> set[str]:
    """The modules of `watched` that are loaded after importing `modules` in a fresh process."""
    lines = ["import importlib, sys", f"for m in {modules}: importlib.import_module(m)"]
    code = "\n".join([*lines, f"print(*({watched} & set(sys.modules)))"])
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_import_uncomp_is_light(tmp_path: Path) -> None:
    assert loaded_after(["uncomp"], {"torch", "vllm", "numpy", "transformers"}, tmp_path) == set()


def test_plugin_import_is_light(tmp_path: Path) -> None:
    # vLLM loads the plugin in every process, also where compression is off
    assert loaded_after(["uncomp.plugin"], {"vllm", "transformers"}, tmp_path) == set()


def test_cli_import_is_light(tmp_path: Path) -> None:
    assert loaded_after(["uncomp.cli"], {"torch", "vllm", "transformers"}, tmp_path) == set()


def test_method_needs_neither_vllm_nor_transformers(root: Path, tmp_path: Path) -> None:
    names = []
    for file in files(root):
        if not below(file, ("uncomp/engine", "uncomp/cli", "patches", "eval")):
            names.append(module_name(file).removesuffix(".__init__"))
    assert "uncomp.kernels.entropy" in names
    assert loaded_after(names, {"vllm", "transformers"}, tmp_path) == set()


def text_files(root: Path) -> Iterator[Path]:
    for folder in (*ROOMS, "tests", "scripts", ".ci", "docs"):
        yield from (root / folder).rglob("*")
    yield from (p for p in root.iterdir() if p.suffix in {".md", ".toml"} or p.name == "Makefile")


def test_no_path_of_a_machine(root: Path) -> None:
    # home folders and package mirrors; written so that it does not find itself
    pattern = re.compile(r"(?<![\w.~$}])/(?:work|root|home|Users|opt)/|[f]ile:///")
    hits = [
        f"{path.relative_to(root)}: {match[0]}"
        for path in text_files(root)
        if path.is_file() and path.suffix not in BINARY
        for match in pattern.finditer(path.read_text(encoding="utf-8"))
    ]
    assert hits == []


@pytest.mark.parametrize("limit", [400])
def test_files_can_be_read_in_one_sitting(limit: int, root: Path) -> None:
    paths = [path for room in (*ROOMS, "tests") for path in (root / room).rglob("*.py")]
    lengths = {str(p.relative_to(root)): len(p.read_text().splitlines()) for p in paths}
    assert {file: length for file, length in lengths.items() if length > limit} == {}
