"""Say which kernels run packed models on this machine, and why: for users who miss speed."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

import torch
import transformers

from prunus.packed.description import METHOD
from prunus.packed.kernels import library as kernels

__all__ = ["describe"]


def describe() -> dict[str, Any]:
    """Describe the state of the kernels.

    Returns:
        A dict that JSON can hold:

        - kernels: whether packed linears are multiplied without being expanded.
        - why_not: the reason if they are not, else None.
        - library: the file that was opened.
        - instruction_set, best_instruction_set: the one in use, and the best of this machine.
        - chosen_by: what decided on the instruction set.
        - dense_kernel: whether dense bfloat16 linears of packed models use a kernel as well.
        - threads: how many threads torch uses.
        - thread_runtime: whose threads the kernels run on.
        - registered: whether transformers knows the packed format in this process.
        - torch, transformers, python, machine: versions.
    """
    asked = os.environ.get("PRUNUS_ISA")
    found = kernels.load()
    best = None if found is None else kernels.ISAS[found.library.prunus_best_isa()]
    table = sys.modules.get("transformers.quantizers.auto")
    return {
        "kernels": found is not None,
        "why_not": kernels.why_not(),
        "library": None if found is None else str(found.path),
        "instruction_set": None if found is None else found.isa_name,
        "best_instruction_set": best,
        "chosen_by": f"PRUNUS_ISA={asked}" if asked else "the best this machine has",
        "dense_kernel": found is not None and found.has_dense,
        "threads": torch.get_num_threads(),
        "thread_runtime": None
        if found is None
        else found.runtime or "the calling thread alone: no OpenMP found",
        "registered": table is not None and METHOD in table.AUTO_QUANTIZER_MAPPING,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
