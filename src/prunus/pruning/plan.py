"""Everything that is checked and decided before prune or compress does any work.

Whatever would make a run fail later fails here. `run.py` follows the job, and `prunus plan` prints
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from prunus.hardware.memory import resident_memory
from prunus.methods import Method, Work, check_options, compose, get_method
from prunus.methods.patterns import Pattern, check_shape
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource, ModuleSource
from prunus.pruning.block.linear import LinearSettings
from prunus.pruning.job import LinearSelection, PruningJob, select_linears
from prunus.pruning.options import PruningOptions
from prunus.pruning.recipe import Recipe
from prunus.runs.job import windows_per_batch
from prunus.runs.options import RunOptions
from prunus.runs.plan import check_memory, open_model


def plan_run(
    model: str | Path | nn.Module,
    recipe: PruningOptions,
    options: RunOptions,
    kind: type[PruningJob] = PruningJob,
    decided_dtype: str | None = None,
) -> PruningJob:
    """Check all that needs neither weights nor text, and decide what the recipe leaves open."""
    settings = _linear_settings(recipe, options.own_method, kind.QUANTIZES)
    method = settings.method
    selections: list[LinearSelection] = []

    def check(source: CheckpointSource | ModuleSource, skeleton: Skeleton) -> None:
        if isinstance(recipe, Recipe) and recipe.head:
            head = skeleton.head()
            check_shape(settings.work.pattern, head.shape, head.name)
        found = select_linears(skeleton, recipe, settings.work.pattern)
        selections.append(kind.select(found, source, skeleton))

    fields = open_model(
        model,
        recipe,
        options,
        needs=method.needs,
        needs_inputs=needs_inputs(recipe, method),
        adds_ridge=method.adds_ridge,
        decided_dtype=decided_dtype,
        check=check,
    )
    found = selections[0]
    job = kind(
        **fields,
        linear_settings=settings,
        selected=found.selected,
        left_dense=found.left_dense,
    )
    job.batch = _batch(job)
    job.check_ranks()
    job.measure_memory()
    check_memory(job)
    job.check()
    return job


def needs_inputs(recipe: PruningOptions, method: Method) -> bool:
    """Whether the method, the allocation or the training of a recipe uses calibration windows."""
    trains = isinstance(recipe, Recipe) and recipe.reconstructs
    return method.needs != "none" or trains or recipe.searches


def _linear_settings(recipe: PruningOptions, own: Method | None, quantizes: bool) -> LinearSettings:
    """How every linear is pruned: the recipe's method with its refinement and weight update."""
    published = own or get_method(recipe.method)
    method = compose(published, recipe, quantizes)
    # Two passes are the published procedure. There the published solvers also sum in its order.
    two_passes = isinstance(recipe, Recipe) and recipe.propagate == "block"
    group = recipe.group
    if group is None:
        group = published.with_options(recipe).default_group
    pattern = Pattern.parse(recipe.pattern, group)
    check_options(published, pattern, recipe.sparsity, recipe, quantizes=quantizes)
    in_order = two_passes and method is published and method.has_reference_order
    work = Work(pattern, recipe.sparsity, recipe, reference_order=in_order)
    return LinearSettings(method=method, work=work)


def _batch(job: PruningJob) -> int:
    """Calibration windows per forward pass."""
    recipe, trains = job.recipe, job.reconstructs != "none"
    if recipe.batch is not None:
        batch = recipe.batch
    elif job.reference_order or job.reconstructs in ("quick", "all"):
        # The reference order sums window by window. Training every block takes a step per window.
        batch = 1
    else:
        window_tokens = job.skeleton.window_shape(0, recipe.seqlen)[0]
        batch = windows_per_batch(recipe.samples, window_tokens, trains)
    if trains and recipe.samples <= batch:
        raise ValueError(
            "reconstruction trains on some batches and validates on others: "
            f"{recipe.samples} windows in batches of {batch} are one batch; give more `samples` or "
            "a smaller `batch`"
        )
    return batch


def describe_plan(job: PruningJob) -> dict[str, Any]:
    """The plan of a run as JSON values.

    Returns:
        Counts: `blocks`, `linears`, `weights` in the selected linears, `to_remove` of them,
        `blocks_in_lockstep`, `batch`. Decisions: `dtype`, `dtype_reason`, `device`, `bos`,
        `hidden_states` (where they are kept), `left_dense` and `allocation`. Cost:
        `peak_memory_bytes`, `file_bytes` (the weights of the result), `disk_bytes` (with temporary
        files). A verb adds entries of its own.
    """
    blocks = range(len(job.skeleton))
    shapes: Sequence[tuple[int, int]] = [x.shape for x in job.selected_linears().values()]
    weights = sum(rows * columns for rows, columns in shapes)
    place = "memory" if job.hidden_states_stay else "pinned host memory"
    return {
        "blocks": len(blocks),
        "linears": len(shapes),
        "weights": weights,
        "to_remove": int(weights * job.linear_settings.work.sparsity),
        "left_dense": {name: list(shape) for name, shape in job.left_dense.items()},
        "dtype": str(job.dtype).removeprefix("torch."),
        "dtype_reason": job.dtype_reason,
        "device": str(job.device),
        "batch": job.batch,
        "bos": job.recipe.bos,
        "hidden_states": "file" if job.spills else place,
        "blocks_in_lockstep": sum(job.fits_lockstep(index) for index in blocks),
        "peak_memory_bytes": job.peak_bytes() + resident_memory(),
        "file_bytes": job.file_bytes(),
        "disk_bytes": job.disk_bytes(),
        "allocation": {
            "rule": job.recipe.allocation,
            "measured": job.recipe.searches and job.recipe.sparsity > 0,
        },
        **job.describe(),
    }
