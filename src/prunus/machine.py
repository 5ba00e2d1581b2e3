"""The machine and the versions that a run is carried out with: memory, processor, speed."""

from __future__ import annotations

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
    "available_memory",
    "hardware",
    "keep_freed_memory",
    "matmul_rate",
    "peak_memory",
    "processor_name",
    "resident_memory",
    "versions",
]


def peak_memory(device: torch.device | None = None) -> int:
    """Peak memory of this process so far in bytes: resident on the host, allocated on a CUDA device."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
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
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            available = min(available, max(0, int(limit) - used))
    except (OSError, ValueError):
        pass
    return available


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


def hardware(device: torch.device) -> dict[str, Any]:
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
