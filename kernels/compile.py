"""Compile every kernel variant for GPUs that need not be there: `python -m uncomp.kernels.compile`.

Prints shared memory, registers and spills as the compilers report them. Exit status 1 if a variant
does not compile, needs more shared memory than the target has, or is a default and spills.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from uncomp.kernels.variant import Variant

#: folders with a `variants.py` that defines `VARIANTS: list[Variant]`
FOLDERS = ("gram", "entropy", "window_scores", "select", "compact", "decode", "record")


@dataclass(frozen=True)
class Target:
    """A GPU. Attributes: shared: bytes of shared memory that one program may use."""

    gpu: GPUTarget
    shared: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


@dataclass(frozen=True)
class Report:
    """What a compiler said. Attributes: shared: bytes; spills: bytes per thread; error: or ""."""

    variant: str
    config: str
    target: str
    default: bool
    shared: int = 0
    registers: int = 0
    spills: int = 0
    error: str = ""

    @property
    def problem(self) -> str:
        if self.error:
            return self.error
        if self.shared > TARGETS[self.target].shared:
            return f"needs {self.shared} bytes of shared memory of {TARGETS[self.target].shared}"
        if self.default and self.spills:
            return f"the default configuration spills {self.spills} bytes"
        return ""


def compile_variant(variant: Variant, target: str) -> Report:
    """Compile to machine code for a target of `TARGETS`."""
    report = (variant.name, str(variant.config), target, variant.default)
    constants = {**variant.constants, **variant.config.meta}
    unknown = set(constants) | set(variant.signature)
    if unknown != set(variant.kernel.arg_names):
        odd = sorted(unknown ^ set(variant.kernel.arg_names))
        return Report(*report, error=f"signature and constants do not fit the kernel: {odd}")
    signature = {n: variant.signature.get(n, "constexpr") for n in variant.kernel.arg_names}
    # What a launch finds out of real tensors: addresses and strides are multiples of 16. Loads are
    # wider then and pipelined, which takes more shared memory and registers.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, parameter in enumerate(variant.kernel.params)
        if _specialized(parameter, signature[parameter.name])
    }
    source = ASTSource(variant.kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": variant.config.num_warps, "num_stages": variant.config.num_stages}
    gpu = TARGETS[target].gpu
    try:
        compiled = triton.compile(source, target=gpu, options=options)
        if gpu.backend == "cuda":
            registers, spills = _ptxas(compiled.asm["ptx"], gpu.arch)
        else:
            registers, spills = _amdgcn(compiled.asm["amdgcn"])
    except Exception as error:
        return Report(*report, error=f"{type(error).__name__}: {str(error)[-300:]}")
    return Report(*report, compiled.metadata.shared, registers, spills)


def _specialized(parameter: Any, kind: str) -> bool:
    if kind == "constexpr" or kind.startswith("fp") or parameter.do_not_specialize:
        return False
    return not (kind.startswith("*") and parameter.do_not_specialize_on_alignment)


def variants(folders: tuple[str, ...] = FOLDERS) -> list[Variant]:
    """All variants of these kernels."""
    found: list[Variant] = []
    for folder in folders:
        found += importlib.import_module(f"uncomp.kernels.{folder}.variants").VARIANTS
    return found


def _ptxas(ptx: str, capability: int) -> tuple[int, int]:
    arch = re.search(r"^\.target (\w+)", ptx, re.M)
    assert arch is not None
    nvidia = triton.knobs.nvidia
    try:
        from triton.backends.nvidia.compiler import get_ptxas  # which one is Triton's business

        tool = get_ptxas(capability)
    except ImportError:
        tool = nvidia.ptxas_blackwell if capability >= 100 else nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [tool.path, "-v", f"--gpu-name={arch[1]}", str(path)]
        run = subprocess.run(
            [*command, "-o", os.devnull], capture_output=True, text=True, check=True
        )
    used = re.findall(r"Used (\d+) registers", run.stderr)
    spilled = re.findall(r"(\d+) bytes spill stores", run.stderr)
    return max(map(int, used)), max(map(int, spilled))


def _amdgcn(assembly: str) -> tuple[int, int]:
    used = re.findall(r"\.vgpr_count:\s*(\d+)", assembly)
    spilled = re.findall(r"\.vgpr_spill_count:\s*(\d+)", assembly)
    return max(map(int, used)), 4 * max(map(int, spilled))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--kernel", action="append", choices=FOLDERS, help="default: all")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    given = parser.parse_args(arguments)
    reports = [
        compile_variant(variant, target)
        for variant in variants(tuple(given.kernel or FOLDERS))
        for target in given.target or TARGETS
        if target not in variant.skip
    ]
    if given.json:
        print(json.dumps([{**asdict(r), "problem": r.problem} for r in reports]))
    else:
        print(f"{'variant':44} {'configuration':34} {'target':7} {'shared':>7} {'regs':>5} spills")
        for r in reports:
            facts = f"{r.shared:7} {r.registers:5} {r.spills:6}"
            print(f"{r.variant:44} {r.config:34} {r.target:7} {facts} {r.problem}")
    return int(any(r.problem for r in reports))


if __name__ == "__main__":
    sys.exit(main())
