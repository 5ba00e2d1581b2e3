"""Report how packed models run and load on this machine, and why, and which extras are there."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

import torch
import transformers
from packaging.requirements import Requirement

from prunus.hardware.sizes import counted
from prunus.packed.kernels import library as kernels


def describe() -> dict[str, Any]:
    """Everything that `in_sentences` says, as values that JSON can hold.

    `needs_import` is why a program must import prunus before it loads a packed checkpoint, or None.
    `extras` maps each extra of the package to its requirements that are not met.
    """
    asked = os.environ.get("PRUNUS_ISA")
    found = kernels.load()
    best = None if found is None else kernels.ISAS[found.library.prunus_best_isa()]
    installed = None
    with contextlib.suppress(PackageNotFoundError):
        installed = distribution("prunus")
    return {
        "kernels": found is not None,
        "why_not": kernels.why_not(),
        "library": None if found is None else str(found.path),
        "instruction_set": None if found is None else kernels.ISAS[found.isa],
        "best_instruction_set": best,
        "chosen_by": f"PRUNUS_ISA={asked}" if asked else "the best this machine has",
        "dense_kernel": found is not None and found.has_bfloat16,
        "threads": torch.get_num_threads(),
        "thread_runtime": None
        if found is None
        else found.runtime or "the calling thread alone: no OpenMP found",
        "needs_import": _needs_import(installed),
        "extras": {} if installed is None else _extras(installed),
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
            *(
                ["They use it for quantised weights; sparse weights run on portable code."]
                if state["instruction_set"].startswith("neon")
                else []
            ),
            "Dense bfloat16 linears of packed models "
            + ("use a kernel as well." if state["dense_kernel"] else "run in torch."),
            f"Torch uses {counted(state['threads'], 'thread')}; the kernels run on "
            f"{state['thread_runtime']}.",
        ]
    else:
        said += [
            f"Packed models run on slower code in torch, because there are no kernels: "
            f"{state['why_not']}.",
            f"Torch uses {counted(state['threads'], 'thread')}.",
        ]
    reason = state["needs_import"]
    said.append(
        "Programs load packed checkpoints without `import prunus`: torch calls prunus."
        if reason is None
        else f"Programs need `import prunus` to load packed checkpoints: {reason}."
    )
    extras = state["extras"]
    if whole := [extra for extra, missing in extras.items() if not missing]:
        said.append(f"Installed extras: {', '.join(whole)}.")
    return said + [
        f"The extra {extra} is not installed, it lacks {', '.join(missing)}: pip install "
        f"'.[{extra}]'."
        for extra, missing in extras.items()
        if missing
    ]


def _needs_import(installed: Distribution | None) -> str | None:
    """Why torch does not call prunus in this environment; None where it does."""
    if installed is None:
        return "prunus is found by its path and is not installed"
    if not installed.entry_points.select(group="torch.backends"):
        return (
            "this installation, as every editable one, has no entry point for torch; `pip install "
            ".` in the clone, without -e, makes one that has"
        )
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        return "TORCH_DEVICE_BACKEND_AUTOLOAD=0 switches the entry points of torch off"
    return None


def _extras(installed: Distribution) -> dict[str, list[str]]:
    """Each extra -> its requirements that are not met, as the metadata of the package say."""
    needed = [Requirement(text) for text in installed.requires or ()]
    return {
        extra: [
            f"{each.name}{each.specifier}"
            for each in needed
            if each.marker is not None and each.marker.evaluate({"extra": extra})
            if not _is_met(each)
        ]
        for extra in installed.metadata.get_all("Provides-Extra") or ()
    }


def _is_met(needed: Requirement) -> bool:
    with contextlib.suppress(PackageNotFoundError):
        return needed.specifier.contains(distribution(needed.name).version, prereleases=True)
    return False
