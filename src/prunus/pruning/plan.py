"""Everything that is checked and decided before a run does any work.

`check_run` and `plan_run` raise for whatever would make the run fail later. `run.py` follows the
job that they return, and `prunus plan` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from prunus.calibration import check_context
from prunus.distributed import SINGLE_PROCESS
from prunus.hardware.memory import available_memory, memory_budget, resident_memory
from prunus.methods import METHODS, check_options, compose, default_group
from prunus.methods.patterns import Pattern, check_shape
from prunus.model.checkpoint.companions import check_companions
from prunus.model.checkpoint.output_folder import check_disk, check_resume
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.device import choose_device
from prunus.model.kinds import IMAGES, kind_of, require_causal
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource, ModuleSource
from prunus.pruning.block.settings import LinearSettings
from prunus.pruning.compression_cost import check_bits, measurement_memory
from prunus.pruning.cost import block_memory, disk_bytes
from prunus.pruning.job import PruningJob, RunOptions, needs_inputs
from prunus.pruning.manifest import Manifest
from prunus.pruning.output import bytes_in, check_output
from prunus.pruning.rank_checks import check_ranks_can_share
from prunus.pruning.recipe import Recipe
from prunus.pruning.selection import check_inputs, select_linears, select_packable
from prunus.runs.batch_size import windows_per_batch
from prunus.runs.compute_dtype import decide_dtype

__all__ = ["CheckedRun", "check_run", "find_earlier_run", "plan_run"]


@dataclass(frozen=True)
class CheckedRun:
    """A run that may start.

    Attributes:
        job: Its decisions.
        earlier: The manifest of the same run in the output folder, finished or not; None for a new
            run.
    """

    job: PruningJob
    earlier: Manifest | None


def check_run(
    model: str | Path | nn.Module,
    output: Path | None,
    recipe: Recipe,
    options: RunOptions,
    *,
    overwrite: bool = False,
    resume: bool | None = None,
) -> CheckedRun:
    """All checks of a run, and all its decisions. Nothing is written.

    A run that is about to start has locked the output folder. The folder is checked twice. The
    first look comes before anything is downloaded or read. The second one knows how large the
    result will be.

    Args:
        model, recipe, options, overwrite, resume: See `prunus.prune`.
        output: The output folder; None where there is none to check.

    Raises:
        FileExistsError: The output folder holds something else, or another run.
        FileNotFoundError, ValueError, NotImplementedError, OSError: See `plan_run`.
    """
    ranks = options.ranks or SINGLE_PROCESS

    def look() -> dict[str, Any] | None:
        if output is None:
            return None
        earlier = find_earlier_run(Path(str(model)), output, recipe, overwrite, resume)
        return None if earlier is None else earlier.model_dump(mode="json")

    # Rank 0 alone looks at the folder, and tells the others as JSON.
    found = ranks.on_rank_0(look)
    earlier = None if found is None else Manifest.model_validate(found)
    with ranks.fail_together():
        check_ranks_can_share(recipe, ranks)
        # A resumed run keeps its dtype: the trial behind "auto" need not be repeated.
        decided_dtype = earlier.inputs.dtype if earlier is not None else None
        job = plan_run(model, recipe, options, decided_dtype)

    def check_room() -> None:
        if output is not None:
            assert isinstance(job.source, CheckpointSource)
            check_output(output, job.source.checkpoint.folder, overwrite)
            check_disk(output, disk_bytes(job) - bytes_in(output))

    ranks.on_rank_0(check_room)
    return CheckedRun(job, earlier)


def find_earlier_run(
    model: Path, output: Path, recipe: Recipe, overwrite: bool, resume: bool | None
) -> Manifest | None:
    """The manifest of the run in the output folder that this run resumes or finds finished.

    Returns:
        The manifest; None for a new run.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: The run may not write into the folder.
    """
    earlier = check_output(output, model, overwrite)
    check_resume(output, earlier is not None and earlier.state == "running", resume)
    if earlier is not None:
        earlier.check_same_run(recipe)
    return earlier


def plan_run(
    model: str | Path | nn.Module,
    recipe: Recipe,
    options: RunOptions,
    decided_dtype: str | None = None,
) -> PruningJob:
    """Check everything that needs neither weights nor text, and decide what the recipe leaves open.

    Args:
        model: A checkpoint folder, a hub id or a loaded model.
        recipe: What to do.
        options: How to do it.
        decided_dtype: What dtype "auto" meant in the run that is resumed; None for a new run.

    Raises:
        FileNotFoundError, ValueError, NotImplementedError, OSError: Something does not fit; every
            message names what was given, what is wrong and what to do.
    """
    settings = _linear_settings(recipe)
    method, pattern = settings.method, settings.pattern
    loaded = model if isinstance(model, nn.Module) else None
    device = choose_device(options.device, loaded, (options.ranks or SINGLE_PROCESS).local_size)
    source: CheckpointSource | ModuleSource
    if isinstance(model, nn.Module):
        source, name = ModuleSource(model), type(model).__name__
    else:
        source = CheckpointSource(resolve_folder(model), options.trust_remote_code)
        check_companions(source.checkpoint.folder, options.trust_remote_code)
        name = str(model)
    if needs_inputs(recipe, method):
        check_inputs(kind_of(source.config), recipe, options)

    # Structure and names are checked on a skeleton in the stored dtype, before a dtype trial runs.
    skeleton = Skeleton(source.config, source.stored_dtype, options.trust_remote_code)
    source.bind(skeleton)
    if skeleton.kind is not IMAGES:
        check_context(skeleton.max_positions, recipe.seqlen, method.needs)
    if recipe.head:
        head = skeleton.head()
        check_shape(pattern, head.shape, head.name)
    selection = select_linears(skeleton, recipe, pattern)
    if recipe.bits is not None:
        if isinstance(source, ModuleSource):
            raise ValueError(
                "a compressed model is a packed checkpoint: give the folder of a checkpoint "
                "instead of a loaded model"
            )
        require_causal(source.config, "prunus compress")
        selection = select_packable(selection, skeleton, source)

    dtype, reason = decide_dtype(
        decided_dtype if recipe.dtype == "auto" and decided_dtype else recipe.dtype,
        source,
        skeleton,
        device,
        method.needs,
        options.trust_remote_code,
        adds_ridge=method.adds_ridge,
    )
    if dtype != source.stored_dtype:
        skeleton = Skeleton(source.config, dtype, options.trust_remote_code)
        source.bind(skeleton)

    host_budget = _host_budget(options)
    job = PruningJob(
        recipe=recipe,
        options=options,
        model_name=name,
        source=source,
        skeleton=skeleton,
        linear_settings=settings,
        device=device,
        dtype=dtype,
        dtype_reason=reason,
        batch=_batch(recipe, settings, skeleton),
        budget=memory_budget(device, options.memory) if device.type == "cuda" else host_budget,
        host_budget=host_budget,
        selected=selection.selected,
        left_dense=selection.left_dense,
    )
    if recipe.bits is not None:
        check_bits(job)
    job.block_memory = [block_memory(job, index) for index in range(len(skeleton))]
    _check_memory(job)
    return job


def _linear_settings(recipe: Recipe) -> LinearSettings:
    """How every linear is pruned: the recipe's method with its refinement and weight update.

    Raises:
        ValueError: Method, pattern, sparsity and options do not fit together.
    """
    published = METHODS[recipe.method]
    options = recipe.method_options
    method = compose(published, options)
    # Two passes are the published procedure. There the published solvers also sum in its order.
    as_published = recipe.propagate == "block" and method is published
    if as_published and recipe.method in ("sparsegpt", "obs"):
        options = replace(options, reference_order=True)
    group = recipe.group if recipe.group is not None else default_group(recipe.method, options)
    pattern = Pattern.parse(recipe.pattern, group)
    check_options(recipe.method, pattern, recipe.sparsity, options)
    return LinearSettings(method=method, pattern=pattern, sparsity=recipe.sparsity, options=options)


def _batch(recipe: Recipe, settings: LinearSettings, skeleton: Skeleton) -> int:
    """Calibration windows per forward pass.

    Raises:
        ValueError: All windows are one batch, and reconstruction needs a second one for validation.
    """
    if recipe.batch is not None:
        batch = recipe.batch
    elif settings.options.reference_order or recipe.reconstruct in ("quick", "all"):
        # The reference order sums window by window. Training every block takes a step per window.
        batch = 1
    else:
        window_tokens = skeleton.window_shape(0, recipe.seqlen)[0]
        batch = windows_per_batch(recipe.samples, window_tokens, recipe.reconstructs)
    if recipe.reconstructs and recipe.samples <= batch:
        raise ValueError(
            "reconstruction trains on some batches and validates on others: "
            f"{recipe.samples} windows in batches of {batch} are one batch; give more --samples or "
            "a smaller --batch"
        )
    return batch


def _host_budget(options: RunOptions) -> int:
    """Bytes that the run may take on the host, beside what the process already holds."""
    budget = options.memory
    if budget is None:
        ranks = options.ranks or SINGLE_PROCESS
        budget = available_memory() // ranks.local_size + resident_memory()
    return budget - resident_memory()


def _check_memory(job: PruningJob) -> None:
    """Check that every block fits with its hidden states elsewhere and one batch in flight.

    Raises:
        ValueError: A block, or the measurement of a run that compresses, does not fit into the
            memory budget.
    """
    needed = max(memory.minimum for memory in job.block_memory)
    if job.budget < needed:
        raise ValueError(
            f"a block needs {(needed + resident_memory()) / 1e9:.2f} GB with one batch of "
            f"{job.batch} windows of {job.recipe.seqlen} tokens in flight; the memory budget is "
            f"{(job.budget + resident_memory()) / 1e9:.2f} GB. Raise --memory or lower --batch or "
            "--seqlen"
        )
    if job.recipe.bits is None:
        return
    measured = measurement_memory(job).total(hidden=job.device.type == "cpu", paused=False)
    if job.budget < measured:
        raise ValueError(
            "measuring how the loss depends on each linear needs "
            f"{(measured + resident_memory()) / 1e9:.2f} GB; the memory budget is "
            f"{(job.budget + resident_memory()) / 1e9:.2f} GB. Raise --memory"
        )
