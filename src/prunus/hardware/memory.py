"""The machine and the versions that a run is carried out with: memory, processor, speed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "ScatteredMemory",
    "available_memory",
    "describe_hardware",
    "keep_freed_memory",
    "matmul_rate",
    "memory_budget",
    "peak_memory",
    "processor_name",
    "resident_memory",
    "versions",
]


def peak_memory(device: torch.device | None = None) -> int:
    """Peak memory of this process so far in bytes: resident on the host, allocated on a CUDA device."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # Linux counts in ru_maxrss what the process held that started this one, before it became it.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """Bytes of this process that are in memory now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_memory() -> int:
    """Bytes that can still be taken without swapping, the limit of the process' cgroup included."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError:
        pass
    for limit_file, usage_file in _cgroup_files():
        try:
            limit, used = limit_file.read_text().strip(), int(usage_file.read_text())
            if limit != "max":
                # What the group holds of files can be given back; it is counted as used all the same, to be safe.
                available = min(available, max(0, int(limit) - used))
        except (OSError, ValueError):
            pass
    return available


def _cgroup_files() -> list[tuple[Path, Path]]:
    """(limit, usage) of the memory control groups that this process may be in, whether they are there or not."""
    root, own = Path("/sys/fs/cgroup"), {}
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own[controllers] = path.lstrip("/")
    except (OSError, ValueError):
        pass
    second = [root, root / own.get("", "")]
    first = [root / "memory", root / "memory" / own.get("memory", "")]
    return [(x / "memory.max", x / "memory.current") for x in second] + [
        (x / "memory.limit_in_bytes", x / "memory.usage_in_bytes") for x in first
    ]


def memory_budget(device: torch.device, memory: int | None) -> int:
    """Bytes that the process may have in all where `device` computes: `memory` where it is given, else what is free.

    Of a CUDA device a tenth is left to the allocator's rounding.
    """
    if memory is not None:
        return memory
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.9)
    return available_memory() + resident_memory()


def keep_freed_memory() -> None:
    """Have this process keep the memory that it frees, for its next tensors.

    glibc gives large pieces back to the system at once and gets them anew as pages to be zeroed: where every step
    makes the same large tensors again, that is a fifth of a training step on a CPU. Does nothing without glibc.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    set_option(mmap_max, 0)
    set_option(trim_threshold, 2**31 - 1)


class ScatteredMemory:
    """Gives freed memory back to the system once it has grown. Does nothing without glibc.

    What one thread allocates and another frees scatters: under gloo, pieces of free memory add up that nobody asks for
    again. To give all of them back takes a tenth of a second and more, so it waits until they are a tenth of the process.
    """

    def __init__(self) -> None:
        self._usual = 0

    def tidy(self) -> None:
        """To be called at like moments of a run, at which it holds about as much as at the one before."""
        resident = resident_memory()
        if not self._usual:
            self._usual = resident
        elif resident > 1.1 * self._usual:
            with contextlib.suppress(AttributeError, OSError, TypeError):
                ctypes.CDLL(None).malloc_trim(0)
            self._usual = max(self._usual, resident_memory())


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product, measured in about 0.1 s."""
    left = torch.ones(1024, 1024, device=device, dtype=dtype)
    right = torch.ones(1024, 1024, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        torch.nn.functional.linear(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best


def versions() -> dict[str, str]:
    """Versions of what decides the result."""
    return {
        "prunus": version("prunus"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "safetensors": version("safetensors"),
        "python": platform.python_version(),
    }


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """The hardware a run is carried out on."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def processor_name() -> str:
    """The processor in words, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
