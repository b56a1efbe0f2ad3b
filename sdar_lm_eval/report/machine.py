"""Facts on this machine: versions of packages, devices, and the engines that can run on it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import sdar_lm_eval
from sdar_lm_eval.engines.adapters.installed import version_of
from sdar_lm_eval.engines.native.options import resolve_device, resolve_kernels
from sdar_lm_eval.engines.registry import ENGINES, EngineSpec, why_not_here
from sdar_lm_eval.files import one_line

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """A GPU, or the CPU.

    Attributes:
        name: the name that model_args take: "cuda:0", "cpu".
        model: the maker's name of the device; "cannot be used" for a GPU that failed.
        memory: memory in bytes; None where the system does not say.
        free: unused memory in bytes; None where the system does not say.
        driver: version of the GPU's driver; None for the CPU, and where nvidia-smi is missing.
        detail: a GPU's compute capability, or the error of a GPU that failed; the CPU's numbers of cores and threads.
    """

    name: str
    model: str
    memory: int | None
    free: int | None
    driver: str | None
    detail: str

    def __str__(self) -> str:
        memory = f", {self.memory / GIB:.1f} GiB" if self.memory is not None else ""
        free = f" ({self.free / GIB:.1f} GiB free)" if self.free is not None else ""
        driver = f", driver {self.driver}" if self.driver is not None else ""
        return f"{self.name}: {self.model}{memory}{free}{driver}, {self.detail}"


def versions() -> dict[str, str | None]:
    """Return package -> version, None where the package is not installed."""
    packages = ["torch", "transformers", "lm_eval", *(name for spec in ENGINES.values() for name in spec.packages)]
    return {
        "sdar-lm-eval": sdar_lm_eval.__version__,
        "python": platform.python_version(),
        **{name: version_of(name) for name in packages},
    }


def devices() -> list[Device]:
    """Return the GPUs that torch sees, then the CPU."""
    driver = _driver()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [*(_gpu(index, driver) for index in range(count)), _cpu()]


def _gpu(index: int, driver: str | None) -> Device:
    name = f"cuda:{index}"
    try:
        free, total = torch.cuda.mem_get_info(index)
        capability = "compute capability " + ".".join(map(str, torch.cuda.get_device_capability(index)))
        return Device(name, torch.cuda.get_device_name(index), total, free, driver, capability)
    except (RuntimeError, AssertionError) as error:  # a GPU that has failed, or that another process holds
        return Device(name, "cannot be used", None, None, driver, one_line(error))


def no_gpu() -> str:
    """Return the likely reason why torch sees no GPU; "" where torch sees one."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA, so it sees no GPU."
    driver = _driver()
    if driver is None:
        return f"torch is built for CUDA {torch.version.cuda}, but there is no NVIDIA driver (nvidia-smi)."
    return f"torch is built for CUDA {torch.version.cuda}, but sees no GPU with driver {driver}. Update the driver."


def _driver() -> str | None:
    """The version of NVIDIA's driver, by nvidia-smi, since torch does not report it; None where it is unknown."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line.strip() for line in done.stdout.splitlines() if line.strip()), None)


def cpu_name() -> str:
    """Return the maker's name of the CPU, or else the name of its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8", "replace").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _cpu() -> Device:
    memory = free = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        page = os.sysconf("SC_PAGE_SIZE")
        memory = page * os.sysconf("SC_PHYS_PAGES")
        free = page * os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else None
    return Device("cpu", cpu_name(), memory, free, None, f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")


@dataclass(frozen=True)
class EngineStatus:
    """Whether an engine can run on this machine.

    Attributes:
        name: the engine's name.
        model: the name of its model for `lm_eval --model`.
        lacks: the thing that the engine lacks here, with the command that installs it; None where the engine can run.
        note: the device that the engine runs on, and what its kernels lack; "cannot run here" where `lacks` is set.
    """

    name: str
    model: str
    lacks: str | None
    note: str

    def __str__(self) -> str:
        return f"{self.name}: {self.note if self.lacks is None else self.lacks}"


def engine_statuses(names: Sequence[str]) -> list[EngineStatus]:
    """Return for each of these engines whether it can run on this machine, or else what it lacks."""
    return [_engine_status(ENGINES[name]) for name in names]


def _engine_status(spec: EngineSpec) -> EngineStatus:
    lacks = why_not_here(spec)
    if lacks is not None:
        return EngineStatus(spec.name, spec.model, lacks, "cannot run here")
    device = resolve_device("auto")
    note = f"runs here on {device} (--model {spec.model})"
    if spec.name == "native" and device.type == "cuda" and not resolve_kernels(None, device):
        note += ", without its kernels, which need triton (pip install triton) and compute capability 8.0"
    return EngineStatus(spec.name, spec.model, lacks, note)
