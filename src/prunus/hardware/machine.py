"""The processor, the kernels and the installed libraries: what decides how fast a run is.

`prunus --version` prints it, so this file imports torch only where its build may know CUDA, which
takes seconds.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from prunus.kernels import library


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
        opened = library.load()
        return f"none: {library.why_not()}" if opened is None else library.ISAS[opened.isa]
    except ValueError as wrong:  # PRUNUS_ISA names no instruction set of this machine
        return f"none: {wrong}"


def _cuda() -> str:
    """The name of the CUDA device, if there is one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no"
