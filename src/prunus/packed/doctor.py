"""What the packed models of this installation run on, and why: for people who wonder why it is slow."""

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
    """The state of the kernels in words and numbers.

    Returns:
        A JSON-ready dict:

        - kernels: whether packed linears are multiplied without expanding them; why_not: if not, the reason.
        - library: the file that was opened.
        - instruction_set, best_instruction_set: in use, and the best this machine has; chosen_by: what decided.
        - dense_kernel: whether dense bfloat16 linears of packed models use a kernel as well.
        - threads: how many torch uses; thread_runtime: whose threads the kernels run on.
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
