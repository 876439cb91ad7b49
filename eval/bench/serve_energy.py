"""Energy counters of this machine, where they can be read: GPUs by NVML, CPU packages by RAPL."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Meter:
    """An energy counter.

    Attributes:
        source: what it covers, e.g. ``NVML, 1 GPU``.
        joules: reads it; only differences mean something.
    """

    source: str
    joules: Callable[[], float]


def find(
    environment: Mapping[str, str] | None = None, powercap: Path = _POWERCAP
) -> tuple[Meter | None, str]:
    """The meter of this machine, GPUs first, and what it is or why there is none."""
    gpu, no_gpu = _nvml(os.environ if environment is None else environment)
    if gpu is not None:
        return gpu, gpu.source
    cpu, no_cpu = _rapl(powercap)
    if cpu is not None:
        return cpu, cpu.source
    return None, f"not readable ({no_gpu}; {no_cpu})"


def _nvml(environment: Mapping[str, str]) -> tuple[Meter | None, str]:
    nvml = _pynvml()
    if nvml is None:
        return None, "no pynvml"
    try:
        nvml.nvmlInit()
        chosen = environment.get("CUDA_VISIBLE_DEVICES")
        handles = [
            nvml.nvmlDeviceGetHandleByIndex(int(name))
            if name.isdigit()
            else nvml.nvmlDeviceGetHandleByUUID(name)
            for name in (
                map(str, range(nvml.nvmlDeviceGetCount()))
                if chosen is None
                else filter(None, chosen.replace(" ", "").split(","))
            )
        ]
        if not handles:
            return None, "NVML: no GPU"

        def joules() -> float:
            return sum(nvml.nvmlDeviceGetTotalEnergyConsumption(h) for h in handles) / 1000

        joules()
    except nvml.NVMLError as error:
        return None, f"NVML: {error}"
    return Meter(f"NVML, {len(handles)} GPU", joules), ""


def _pynvml() -> Any:
    try:
        import pynvml
    except ImportError:
        try:
            from vllm.third_party import pynvml
        except ImportError:
            return None
    return pynvml


class _Rapl:
    """Packages of the CPU; their counters wrap."""

    def __init__(self, zones: list[Path]) -> None:
        self._zones = zones
        self._ranges = [int((z / "max_energy_range_uj").read_text()) for z in zones]
        self._last = self._read()
        self._total = 0.0

    def _read(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self._zones]

    def joules(self) -> float:
        """Since it was made. Must be read before a counter can wrap twice (minutes)."""
        now = self._read()
        for new, old, span in zip(now, self._last, self._ranges, strict=True):
            self._total += (new - old) % span
        self._last = now
        return self._total / 1e6


def _rapl(powercap: Path) -> tuple[Meter | None, str]:
    # "intel-rapl:0" is a package (on AMD too); "intel-rapl:0:1" a part of it
    zones = sorted(z for z in powercap.glob("*-rapl:*") if re.fullmatch(r"[\w-]+:\d+", z.name))
    if not zones:
        return None, "RAPL: not there"
    try:
        return Meter(f"RAPL, {len(zones)} CPU package", _Rapl(zones).joules), ""
    except (OSError, ValueError) as error:
        return None, f"RAPL: {error}"
