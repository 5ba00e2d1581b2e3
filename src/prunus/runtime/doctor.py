"""Report how packed models run and load on this machine, and why."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import torch
import transformers

from prunus.runtime.kernels import library as kernels


def describe() -> dict[str, Any]:
    """How packed models run and load here, as values that JSON can hold.

    Returns:
        - kernels: Whether packed linears are multiplied without being expanded.
        - why_not: The reason if they are not, else None.
        - library: The file of the kernels; None without kernels, as are the next two.
        - instruction_set: The one in use.
        - best_instruction_set: The best of this machine.
        - chosen_by: What decided on the instruction set.
        - dense_kernel: Whether dense bfloat16 linears of packed models use a kernel as well.
        - threads: How many threads torch uses.
        - thread_runtime: Whose threads the kernels run on; None without kernels.
        - needs_import: Why a program must import prunus before it loads a packed checkpoint; None
          if it need not.
        - torch, transformers, python: Their versions.
        - machine: The operating system and the processor's architecture.
    """
    chosen = os.environ.get("PRUNUS_ISA")
    opened = kernels.load()
    best = None if opened is None else kernels.ISAS[opened.library.prunus_best_isa()]
    return {
        "kernels": opened is not None,
        "why_not": kernels.why_not(),
        "library": None if opened is None else str(opened.path),
        "instruction_set": None if opened is None else kernels.ISAS[opened.isa],
        "best_instruction_set": best,
        "chosen_by": f"PRUNUS_ISA={chosen}" if chosen else "the best this machine has",
        "dense_kernel": opened is not None and opened.has_bfloat16,
        "threads": torch.get_num_threads(),
        "thread_runtime": None
        if opened is None
        else opened.runtime or "the calling thread alone: no OpenMP found",
        "needs_import": _needs_import(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _needs_import() -> str | None:
    """Why torch does not call prunus in this environment; None where it does."""
    try:
        installed = distribution("prunus")
    except PackageNotFoundError:
        return "prunus is found by its path and is not installed"
    if not installed.entry_points.select(group="torch.backends"):
        return (
            "this installation, as every editable one, has no entry point for torch; `pip install "
            ".` in the clone, without -e, makes one that has"
        )
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        return "TORCH_DEVICE_BACKEND_AUTOLOAD=0 switches the entry points of torch off"
    return None
