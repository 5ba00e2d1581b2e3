"""What `prunus plan` says about a checked run: its decisions and its cost in numbers."""

from __future__ import annotations

from typing import Any

from prunus.hardware.memory import resident_memory
from prunus.pruning.compression_cost import measurement_memory
from prunus.pruning.cost import disk_bytes, file_bytes
from prunus.pruning.job import PruningJob

__all__ = ["describe_plan"]


def describe_plan(job: PruningJob) -> dict[str, Any]:
    """The plan of a run as JSON values.

    Returns:
        Counts: `blocks`, `linears`, `weights` in the selected linears, `to_remove` of them,
        `blocks_in_lockstep`, `batch`. Decisions: `dtype`, `dtype_reason`, `device`, `bos`,
        `hidden_states` (where they are kept), `left_dense` and `allocation` (its rule, and
        whether the run measures it first); `bits` and `head_bits` are null where the run does not
        compress. Cost: `peak_memory_bytes`, `file_bytes` (the weights of the result), `disk_bytes`
        (with temporary files).
    """
    blocks = range(len(job.skeleton))
    shapes = [linear.shape for linear in job.selected_linears().values()]
    weights = sum(rows * columns for rows, columns in shapes)
    return {
        "blocks": len(blocks),
        "linears": len(shapes),
        "weights": weights,
        "to_remove": int(weights * job.linear_settings.sparsity),
        "bits": job.recipe.bits,
        "head_bits": job.recipe.head_bits,
        "left_dense": {name: list(shape) for name, shape in job.left_dense.items()},
        "dtype": str(job.dtype).removeprefix("torch."),
        "dtype_reason": job.dtype_reason,
        "device": str(job.device),
        "batch": job.batch,
        "bos": job.recipe.bos,
        "hidden_states": _place_of_hidden_states(job),
        "blocks_in_lockstep": sum(job.fits_lockstep(index) for index in blocks),
        "peak_memory_bytes": _peak_bytes(job) + resident_memory(),
        "file_bytes": file_bytes(job),
        "disk_bytes": disk_bytes(job),
        "allocation": {
            "rule": job.recipe.allocation,
            "measured": job.recipe.searches and job.recipe.sparsity > 0,
        },
    }


def _peak_bytes(job: PruningJob) -> int:
    """The largest need of any block, or of the measurement before the first block."""
    stay, overlaps = job.hidden_states_stay, job.overlaps and job.device.type == "cpu"
    needed = [
        memory.total(hidden=stay, paused=job.fits_lockstep(index))
        + overlaps * job.overlap_bytes(index)
        for index, memory in enumerate(job.block_memory)
    ]
    if job.recipe.bits is not None:
        needed.append(measurement_memory(job).total(hidden=job.device.type == "cpu", paused=False))
    return max(needed)


def _place_of_hidden_states(job: PruningJob) -> str:
    if job.spills:
        return "file"
    return "memory" if job.hidden_states_stay else "pinned host memory"
