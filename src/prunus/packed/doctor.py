"""Report which kernels this machine uses for packed models, and why, to diagnose slow inference."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import entry_points
from typing import Any

import torch
import transformers

from prunus.packed.kernels import library as kernels

#: Extra of the package -> the modules that it installs, and what they are for.
_EXTRAS = {
    "data": (("datasets",), "C4, WikiText-2 and PTB from the hub"),
    "eval": (("lm_eval",), "prunus eval --tasks and prunus lm-eval"),
    "gguf": (("gguf", "accelerate", "sentencepiece"), "prunus import"),
    "adapters": (("peft",), "peft adapters and prunus recover --mode lora"),
    "serve": (("starlette", "uvicorn"), "prunus serve"),
    "vision": (("PIL",), "image classifiers"),
}


def describe() -> dict[str, Any]:
    """Describe the state of the kernels.

    Returns:
        A dict that JSON can hold:

        - kernels: whether packed linears are multiplied without being expanded; else `why_not`.
        - library: the file that was opened.
        - instruction_set, best_instruction_set, chosen_by: the one in use, the best of this
          machine, and what decided between them.
        - dense_kernel: whether dense bfloat16 linears of packed models use a kernel as well.
        - threads, thread_runtime: how many threads torch uses, and whose the kernels run on.
        - called_by_torch: whether torch calls prunus when it is imported, so that programs load
          packed checkpoints without importing prunus.
        - missing_extras: the extras of the package that are not installed.
        - torch, transformers, python, machine: versions.
    """
    asked = os.environ.get("PRUNUS_ISA")
    found = kernels.load()
    best = None if found is None else kernels.ISAS[found.library.prunus_best_isa()]
    is_called = "prunus" in entry_points(group="torch.backends").names
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
        "called_by_torch": is_called and os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0",
        "missing_extras": [
            extra
            for extra, (modules, _) in _EXTRAS.items()
            if any(importlib.util.find_spec(module) is None for module in modules)
        ],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def in_sentences(state: dict[str, Any]) -> list[str]:
    """Say what `describe` found, one sentence or two on a subject."""
    said = [
        f"Python {state['python']} on {state['machine']}, torch {state['torch']}, transformers "
        f"{state['transformers']}."
    ]
    if state["kernels"]:
        said += [
            f"Packed models run on the compiled kernels of {state['library']}.",
            f"The kernels use {state['instruction_set']} ({state['chosen_by']}); the best of this "
            f"machine is {state['best_instruction_set']}.",
            "Dense bfloat16 linears of packed models "
            + ("use a kernel as well." if state["dense_kernel"] else "run in torch."),
            f"Torch uses {state['threads']} threads; the kernels run on {state['thread_runtime']}.",
        ]
    else:
        said += [
            f"Packed models run on slower code in torch, because there are no kernels: "
            f"{state['why_not']}.",
            f"Torch uses {state['threads']} threads.",
        ]
    said.append(
        "Programs load packed checkpoints without importing prunus."
        if state["called_by_torch"]
        else "Programs need `import prunus` to load packed checkpoints: torch does not call prunus "
        "in an editable install, or where TORCH_DEVICE_BACKEND_AUTOLOAD is 0."
    )
    missing = state["missing_extras"]
    said += [
        f"The extra {extra} is not installed: pip install '.[{extra}]' gives {_EXTRAS[extra][1]}."
        for extra in missing
    ]
    return said if missing else [*said, "All extras are installed."]
