"""The machine: its processor and memory, the kernels, and the installed libraries.

Linux tells most of it in files below /proc and /sys. Where a file is missing, functions fall back
to a portable call, to 0 or to "", because a figure for a report must never end a run.

`prunus --version` prints what counts, so torch, which takes seconds, is imported only by functions
that ask a device. Outline: the processor and the libraries; memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunus.kernels import library

if TYPE_CHECKING:
    import torch


def linux_field(file: str, name: str) -> str:
    """What stands after `name` and a colon in a file of Linux; "" where it stands nowhere."""
    with contextlib.suppress(OSError):
        for line in Path(file).read_text().splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return ""


def processor_name() -> str:
    """The name of the processor, as the system reports it."""
    return linux_field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


# Reading the files of a package takes several milliseconds.
@functools.cache
def installed_version(package: str) -> str:
    """The version of a package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """The versions of the libraries that decide the bytes of a result, by name."""
    return {
        "prunus": installed_version("prunus"),
        "torch": installed_version("torch"),
        "transformers": installed_version("transformers"),
        "safetensors": installed_version("safetensors"),
        "python": platform.python_version(),
    }


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """The processor, its cores and threads, and the device of a run, for its manifest."""
    import torch

    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def describe_machine() -> dict[str, str]:
    """Name -> words: what a report of a fault needs to know of the machine."""
    torch = installed_version("torch")
    return {
        "prunus": installed_version("prunus"),
        "python": f"{platform.python_version()} on {platform.system()}",
        "processor": f"{processor_name()}, {platform.machine()}",
        "kernels": _kernels(),
        "torch": torch,
        "transformers": installed_version("transformers"),
        "gguf": installed_version("gguf"),
        "CUDA": "no" if torch.endswith("+cpu") else _cuda(),
    }


def _kernels() -> str:
    """The instruction set in use, or why there is none."""
    try:
        opened = library.load_kernels()
        return f"none: {library.why_not()}" if opened is None else library.ISAS[opened.isa]
    except ValueError as wrong:  # PRUNUS_ISA names no instruction set of this machine
        return f"none: {wrong}"


def _cuda() -> str:
    """The name of the CUDA device, if there is one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no"


# --- memory ---


def _from_kilobytes(text: str) -> int:
    """The bytes of a size of Linux such as "1024 kB"; 0 for an empty text."""
    return int(text.split(maxsplit=1)[0]) * 1024 if text else 0


def peak_memory(device: torch.device | None = None) -> int:
    """The peak memory of this process so far, in bytes.

    Args:
        device: On a CUDA device it is what torch allocated there. On any other device, or None, it
            is what was resident on the host.
    """
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    # A process is started as a copy of another one, and ru_maxrss includes that copy's memory.
    # VmHWM does not.
    return process_memory("VmHWM") or (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
    )


def process_memory(kind: str = "VmRSS") -> int:
    """Bytes of memory of this process, as Linux counts them; 0 where the system does not say.

    Args:
        kind: VmRSS for what is resident now, VmHWM for the most that was, VmSize for all addresses.
    """
    return _from_kilobytes(linux_field("/proc/self/status", kind))


def available_memory() -> int:
    """The bytes that can still be allocated without swapping, within the limits of cgroups."""
    available = _from_kilobytes(linux_field("/proc/meminfo", "MemAvailable")) or (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    for limit_file, usage_file in _cgroup_files():
        with contextlib.suppress(OSError, ValueError):
            limit = limit_file.read_text().strip()
            used = int(usage_file.read_text())
            if limit != "max":
                # The usage includes cached files, which the system could free. They count as used
                # here, to be on the safe side.
                available = min(available, max(0, int(limit) - used))
    return available


def _cgroup_files() -> list[tuple[Path, Path]]:
    """Pairs (limit file, usage file) of this process's control groups, which need not exist."""
    root = Path("/sys/fs/cgroup")
    # Controllers -> the path of this process's group. Version 2 has one group, of the name "".
    group_paths = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            group_paths[controllers] = path.lstrip("/")
    version_2 = [root, root / group_paths.get("", "")]
    version_1 = [root / "memory", root / "memory" / group_paths.get("memory", "")]
    return [(x / "memory.max", x / "memory.current") for x in version_2] + [
        (x / "memory.limit_in_bytes", x / "memory.usage_in_bytes") for x in version_1
    ]


def memory_budget(device: torch.device, memory: int | None) -> int:
    """The bytes that this process may use in all, on the device that computes.

    Args:
        device: The device that computes. On CUDA a tenth of what is free is left to its allocator,
            and no budget is larger than the rest.
        memory: The budget that the user gives, in bytes; None for what is free.
    """
    if device.type == "cuda":
        import torch

        free = int(torch.cuda.mem_get_info(device)[0] * 0.9)
        return free if memory is None else min(memory, free)
    return memory if memory is not None else available_memory() + process_memory()


#: The share of a memory budget that work may need if the process keeps what it frees: what is kept
#: has gaps between tensors.
ROOM_TO_KEEP = 0.75


def keep_freed_memory() -> None:
    """Make this process keep the memory that it frees, for its next tensors.

    glibc returns large pieces to the system at once. The system zeroes every page that it hands out
    again. Where every step allocates the same large tensors, this takes a fifth of a training step
    on a CPU. What is kept has gaps: a free piece does not serve for one of its own size, because
    torch wants aligned addresses. `return_freed_memory` returns it. New threads share one heap, so
    that what the reader of blocks frees serves the computation. The function does nothing where the
    C library is not glibc, and it holds until the process ends.
    """
    # Options of malloc.h: M_ARENA_MAX, how many heaps all threads share; M_MMAP_THRESHOLD, from
    # which size on a piece is mapped apart, and so returned when freed; M_TRIM_THRESHOLD, from how
    # much free memory on a heap returns it.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        set_option = ctypes.CDLL(None).mallopt
        for option, value in ((-8, 1), (-3, 2**30), (-1, 2**31 - 1)):
            set_option(option, value)


def return_freed_memory() -> None:
    """Give memory that this process has freed back to the system, where the C library is glibc.

    Memory that one thread allocates and another thread frees fragments the heap. With the gloo
    backend such free pieces add up, and are not used again.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
