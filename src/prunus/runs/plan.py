"""What is checked and decided before a run of blocks does any work.

Whatever would make a run fail later fails here, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from prunus.calibration.windows import check_context
from prunus.hardware.memory import available_memory, memory_budget, resident_memory
from prunus.methods.statistics import Needs
from prunus.model.checkpoint.companions import check_companions
from prunus.model.checkpoint.output_folder import check_disk
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.device import choose_device
from prunus.model.kinds import IMAGES, kind_of
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource, ModuleSource
from prunus.runs.batch_size import windows_per_batch
from prunus.runs.compute_dtype import decide_dtype
from prunus.runs.folder import bytes_in
from prunus.runs.job import RunJob
from prunus.runs.options import RunOptions, WindowOptions
from prunus.runs.windows import check_inputs

#: Memory that a run leaves to other programs, where the user gives no budget: this share of what is
#: free, and at least this many bytes.
_SHARE_FOR_OTHERS, _BYTES_FOR_OTHERS = 0.1, 10**9


def open_model(
    model: str | Path | nn.Module,
    recipe: WindowOptions,
    options: RunOptions,
    *,
    needs: Needs,
    needs_inputs: bool,
    adds_ridge: bool = False,
    decided_dtype: str | None = None,
    check: Callable[[CheckpointSource | ModuleSource, Skeleton], object] = lambda *_: None,
) -> dict[str, Any]:
    """Open a model for a run, and decide what the recipe leaves open. Reads no weights and no text.

    Args:
        adds_ridge: Whether a ridge is added to Gram matrices; see `prunus.methods.Method`.
        decided_dtype: What dtype "auto" meant in the run that is resumed; None for a new run.
        check: Checks the structure of the model, before a trial of the dtype runs.

    Returns:
        The fields of a `RunJob`. The batch is that of a run that trains nothing.

    Raises:
        FileNotFoundError, ValueError, NotImplementedError, OSError: Something does not fit; every
            message names what was given, what is wrong and what to do.
    """
    loaded = model if isinstance(model, nn.Module) else None
    trust, ranks = options.trust_remote_code, options.processes
    device = choose_device(options.device, loaded, ranks.local_size)
    source: CheckpointSource | ModuleSource
    if isinstance(model, nn.Module):
        source, name = ModuleSource(model), type(model).__name__
    else:
        source, name = CheckpointSource(resolve_folder(model), trust), str(model)
        check_companions(source.checkpoint.folder, trust)
    if needs_inputs:
        check_inputs(kind_of(source.config), recipe, options)
    # Structure and names are checked on a skeleton in the stored dtype, before a dtype trial runs.
    skeleton = Skeleton(source.config, source.stored_dtype, trust)
    source.bind(skeleton)
    if skeleton.kind is not IMAGES and needs != "none":
        check_context(skeleton.max_positions, recipe.seqlen)
    check(source, skeleton)
    requested = decided_dtype if recipe.dtype == "auto" and decided_dtype else recipe.dtype
    dtype, reason = decide_dtype(
        requested, source, skeleton, device, needs, trust, adds_ridge=adds_ridge
    )
    if dtype != source.stored_dtype:
        skeleton = Skeleton(source.config, dtype, trust)
        source.bind(skeleton)
    host_budget = _host_budget(options)
    on_device = memory_budget(device, options.memory) if device.type == "cuda" else host_budget
    window_tokens = skeleton.window_shape(0, recipe.seqlen)[0]
    return {
        "recipe": recipe,
        "options": options,
        "model_name": name,
        "source": source,
        "skeleton": skeleton,
        "device": device,
        "dtype": dtype,
        "dtype_reason": reason,
        "batch": recipe.batch or windows_per_batch(recipe.samples, window_tokens),
        "budget": on_device,
        "host_budget": host_budget,
        "needs": needs,
        "needs_inputs": needs_inputs,
    }


def check_memory(job: RunJob) -> None:
    """Check that every block fits with its hidden states elsewhere and one batch in flight."""
    needed = max(memory.minimum for memory in job.block_memory)
    if job.budget < needed:
        held = resident_memory()
        raise ValueError(
            f"a block needs {(needed + held) / 1e9:.2f} GB with one batch of {job.batch} windows "
            f"of {job.recipe.seqlen} tokens in flight; the memory budget is "
            f"{(job.budget + held) / 1e9:.2f} GB. Raise `memory`, or lower `batch` or `seqlen`"
        )


def check_room(job: RunJob, output: Path) -> None:
    """Check that the disk has room for the result, beyond what an earlier run has written.

    Raises:
        OSError: It has not.
    """
    check_disk(output, job.disk_bytes() - bytes_in(output))


def _host_budget(options: RunOptions) -> int:
    """Bytes that the run may take on the host, beyond what the process holds already."""
    if options.memory is not None:
        return options.memory - resident_memory()
    free = available_memory()
    kept = max(int(_SHARE_FOR_OTHERS * free), _BYTES_FOR_OTHERS)
    return max(0, free - kept) // options.processes.local_size
