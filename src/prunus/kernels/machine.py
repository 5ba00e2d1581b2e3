"""What `prunus --version` says: the versions and the parts of the machine that decide on speed."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from prunus.kernels import library


def describe() -> dict[str, str]:
    """The processor, the kernels, the versions of libraries, and whether CUDA is there; in words.

    torch takes seconds to import, so only a build of torch that may know CUDA is asked for it.
    """
    torch = _version("torch")
    return {
        "prunus": _version("prunus"),
        "python": f"{platform.python_version()} on {platform.system()}",
        "processor": _processor(),
        "kernels": _kernels(),
        "torch": torch,
        "transformers": _version("transformers"),
        "gguf": _version("gguf"),
        "CUDA": "no" if torch.endswith("+cpu") else _cuda(),
    }


def _version(package: str) -> str:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor(about: Path = Path("/proc/cpuinfo")) -> str:
    """The kind of the processor, with its name where Linux says it."""
    text = about.read_text(encoding="utf-8", errors="replace") if about.is_file() else ""
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return platform.machine() + (f" ({name[1]})" if name else "")


def _kernels() -> str:
    """The instruction set in use, or why there is none."""
    try:
        opened = library.load()
        return f"none: {library.why_not()}" if opened is None else library.ISAS[opened.isa]
    except ValueError as wrong:  # what PRUNUS_ISA names; a run ends with this message
        return f"none: {wrong}"


def _cuda() -> str:
    """The first CUDA device, if there is one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no"
