"""The story of one run: text to windows, windows to hidden states, block after block pruned and written.

checkpoint ──► skeleton ──► how the model calls each block
windows ──► embeddings ──► hidden states
for each block:  load weights ► one lockstep pass ► write shard ► release

Where torchrun started several processes, each takes a share of the windows through the whole model; they meet at every
linear, prune it alike, and the first of them writes.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.calibration import Windows
from prunus.distributed import SINGLE_PROCESS, process_group
from prunus.hardware.memory import ScatteredMemory, describe_hardware, peak_memory, versions
from prunus.hardware.sizes import parse_bytes
from prunus.model.checkpoint.lock import locked
from prunus.model.checkpoint.output_folder import check_disk, check_whole
from prunus.model.source import CheckpointSource, ModuleSource
from prunus.pruning.allocate import allocate
from prunus.pruning.block.prune_block import BlockPruner
from prunus.pruning.calibration_windows import calibration_windows, described
from prunus.pruning.job import PruningJob, RunOptions
from prunus.pruning.manifest import Manifest, RunInputs
from prunus.pruning.output import OutputFolder, bytes_in, check_output, check_resume
from prunus.pruning.plan import plan_run
from prunus.pruning.rank_checks import check_ranks_can_share, check_same_on_all_ranks
from prunus.pruning.recipe import Recipe, load_recipe

__all__ = ["Progress", "check_run", "prune", "run"]


@dataclass(frozen=True)
class Progress:
    """One step of a run, for whoever shows it: `done` of `total` blocks, and what just happened."""

    done: int
    total: int
    message: str
    seconds: float
    peak_memory: int


def prune(
    model: str | Path | nn.Module,
    output: str | Path | None = None,
    method: str | None = None,
    sparsity: float | None = None,
    *,
    pattern: str | None = None,
    calibration: str | torch.Tensor | None = None,
    recipe: str | Path | None = None,
    device: str = "auto",
    memory: str | int | None = None,
    data_dir: str | Path | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool | None = None,
    rank_timeout: float | None = None,
    progress: Callable[[Progress], None] | None = None,
    **recipe_options: Any,
) -> Manifest:
    """Prune a model after training. Under torchrun all processes call this alike, and share the work.

    Args:
        model: a checkpoint folder or hub id, streamed block by block into `output`; or a loaded transformers
            model, pruned in place by the same engine with the same result.
        output: folder of the pruned checkpoint; for a loaded model None (call its `save_pretrained`).
        method: magnitude, wanda (default), wanda-variant, ria, sparsegpt, obs or alps.
        sparsity: share of the weights of each linear that goes, in [0, 1); default 0.5.
        pattern: "N:M" keeps at most N of every M consecutive inputs; instead of `sparsity`.
        calibration: a source (see `prunus.calibration.SOURCES`; default "c4"), token ids (samples, seqlen), or
            for an image classifier a folder of images, or pixel values (samples, channels, height, width).
        recipe: TOML file with any of these options; arguments override it.
        device: auto, cpu, cuda or cuda:i.
        memory: budget, such as "8GB" or bytes; default what is free.
        data_dir: local mirror of the calibration corpora.
        tokenizer: of the model, or its image processor; by default loaded from the checkpoint.
        trust_remote_code: run model code that comes with the checkpoint.
        overwrite: replace an earlier result of prunus in `output`.
        resume: True insists on an unfinished run in `output`, False refuses one; by default it is resumed if it
            matches.
        rank_timeout: under torchrun, seconds after which a process that gives no sign of life counts as lost; default
            600.
        progress: called after every block; under torchrun on rank 0.
        **recipe_options: further fields of `Recipe`: samples, seqlen, seed, batch, dtype, group, propagate, only,
            ignore, head, min_expert_tokens, mask_from, mask_order, damping, ria_power, iterations, refine,
            refine_rounds, update, targets, mix, match_blocks, match_last, match_passes, match_rate, permute,
            allocation, allocation_by, allocation_spread.

    Returns:
        The manifest: recipe, inputs, per linear shape, sparsity reached, error and seconds, and totals. For a
        checkpoint it is also written to `prunus.json`.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, OSError: before any work where
            possible; the message says what was given, what is wrong and what to do.
        RankError: under torchrun, another process was lost or met an error; names it.
    """
    overrides = {"method": method, "sparsity": sparsity, "pattern": pattern, **recipe_options}
    given = calibration if isinstance(calibration, torch.Tensor) else None
    overrides |= {"calibration": calibration} if given is None else described(given)
    chosen = load_recipe(Path(recipe) if recipe is not None else None, overrides)
    options = RunOptions(
        device=device,
        memory=parse_bytes(memory) if isinstance(memory, str) else memory,
        data_dir=Path(data_dir) if data_dir is not None else None,
        tokenizer=tokenizer,
        input_ids=given,
        trust_remote_code=trust_remote_code,
        rank_timeout=rank_timeout,
    )
    target = Path(output) if output is not None else None
    return run(
        model, target, chosen, options, overwrite=overwrite, resume=resume, progress=progress
    )


def check_run(
    model: str | Path | nn.Module,
    output: Path | None,
    recipe: Recipe,
    options: RunOptions,
    *,
    overwrite: bool = False,
    resume: bool | None = None,
) -> tuple[PruningJob, Manifest | None]:
    """Everything that is looked at before a run does any work, and where `prunus plan` stops.

    Returns the checked job, and the manifest of the run in `output` that it goes on with, if there is one.
    """
    ranks = options.ranks or SINGLE_PROCESS

    def look() -> dict[str, Any] | None:
        """Before anything is downloaded or read: is there room for a result at all?"""
        if output is None:
            return None
        earlier = check_output(output, Path(str(model)), overwrite)
        check_resume(output, earlier, resume)
        if earlier is not None:
            earlier.check_same_run(recipe)
        return None if earlier is None else earlier.model_dump(mode="json")

    found = ranks.on_rank_0(look)
    earlier = None if found is None else Manifest.model_validate(found)
    with ranks.fail_together():
        check_ranks_can_share(recipe, ranks)
        job = plan_run(
            model,
            recipe,
            options,
            decided_dtype=earlier.inputs.dtype if earlier is not None else None,
        )

    def look_again() -> None:
        if output is not None:
            assert isinstance(job.source, CheckpointSource)
            check_output(output, job.source.checkpoint.folder, overwrite)
            check_disk(output, job.disk - bytes_in(output))

    ranks.on_rank_0(look_again)
    return job, earlier


def run(
    model: str | Path | nn.Module,
    output: Path | None,
    recipe: Recipe,
    options: RunOptions,
    *,
    overwrite: bool = False,
    resume: bool | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Carry out a recipe; see `prune` for the meaning of the arguments."""
    if options.ranks is None:
        with process_group(options.rank_timeout) as ranks:
            joint = replace(options, ranks=ranks)
            return run(
                model, output, recipe, joint, overwrite=overwrite, resume=resume, progress=progress
            )
    ranks, started = options.ranks, time.perf_counter()
    if isinstance(model, nn.Module) != (output is None):
        raise ValueError(
            "a loaded model is pruned in place: leave output out and call its save_pretrained afterwards"
            if output is not None
            else "a checkpoint is pruned into a new folder: give output"
        )
    job, earlier = check_run(model, output, recipe, options, overwrite=overwrite, resume=resume)
    with locked(output) if output is not None else contextlib.nullcontext():
        return _carry_out(model, output, job, earlier, started, overwrite, progress)


def _carry_out(
    model: str | Path | nn.Module,
    output: Path | None,
    job: PruningJob,
    earlier: Manifest | None,
    started: float,
    overwrite: bool,
    progress: Callable[[Progress], None] | None,
) -> Manifest:
    """What `run` does once everything is checked and the folder is its own."""
    recipe, options, ranks = job.recipe, job.options, job.ranks
    with ranks.fail_together():
        windows = calibration_windows(job)
        manifest = _manifest(model, job, windows, earlier)
    walks = check_same_on_all_ranks(job, manifest)
    if manifest.state == "finished":
        assert output is not None
        ranks.on_rank_0(lambda: check_whole(output))
        return manifest
    if not manifest.allocation:
        with ranks.fail_together():
            manifest.allocation = allocate(job, windows.ids)
        manifest.allocation = ranks.on_rank_0(lambda: manifest.allocation)
    folder = None
    if output is not None:
        assert isinstance(job.source, CheckpointSource)
        with ranks.fail_together():
            job.source.check_outside_finite()
        folder = OutputFolder(output, job.source, manifest, ranks, job.host_budget)
        folder.begin(overwrite)

    engine = BlockPruner(
        job.skeleton,
        job.source,
        job.linear_settings,
        job.device,
        job.reconstruction,
        recipe.permute,
        manifest.allocation,
        ranks,
        recipe.min_expert_tokens,
        job.drift_stride,
        job.uses_dense_target,
    )
    with torch.no_grad(), contextlib.closing(engine), _threads(1 if job.reference_order else None):
        batches = windows.ids.split(job.batch) if len(windows.ids) else ()
        scratch = output or Path(tempfile.gettempdir())
        scattered = ScatteredMemory()
        engine.embed(
            batches, spill_to=scratch if job.spills else None, on_device=job.hidden_states_stay
        )
        for index in range(len(job.skeleton)):
            block_started = time.perf_counter()
            finished = folder is not None and index < len(manifest.blocks)
            if folder is not None and finished and not job.reference_order:
                engine.propagate(index, folder.read_block(index))
                message = "taken from the earlier run"
            else:
                stored = job.source.block(index)
                changed, record = engine.prune(index, stored, job.selected[index], walks[index])
                record.seconds = round(time.perf_counter() - block_started, 3)
                if finished:
                    pass  # what was written is rounded; the next block needs the weights before that
                elif folder is not None:
                    folder.commit_block(index, stored, changed, record)
                else:
                    assert isinstance(job.source, ModuleSource)
                    job.source.write(index, changed)
                    manifest.blocks.append(record)
                message = f"pruned in {record.seconds:.2f} s"
                if record.walk == "replay":
                    message += (
                        ", with one batch in flight: paused windows do not fit in the memory budget"
                    )
                del stored, changed
                if ranks.size > 1:
                    scattered.tidy()
            if progress is not None and ranks.rank == 0:
                progress(
                    Progress(
                        done=index + 1,
                        total=len(job.skeleton),
                        message=f"{job.skeleton.block_name(index)} {message}",
                        seconds=time.perf_counter() - started,
                        peak_memory=peak_memory(job.device),
                    )
                )

        outside: dict[str, torch.Tensor] = {}
        if recipe.head:
            outside, manifest.head = engine.prune_head(batches)
            if isinstance(job.source, ModuleSource):
                job.source.write_outside(outside)

    manifest.close(seconds=time.perf_counter() - started, device=job.device)
    if folder is not None:
        folder.finish(options.trust_remote_code, outside)
    return manifest


def _manifest(model: Any, job: PruningJob, windows: Windows, earlier: Manifest | None) -> Manifest:
    """A new manifest, or the earlier run's where it is this very run."""
    inputs = RunInputs(
        checkpoint=job.source.fingerprint,
        calibration=windows.source,
        calibration_sha256=windows.sha256,
        dtype=str(job.dtype).removeprefix("torch."),
        dtype_reason=job.dtype_reason,
        device=job.device.type,
        batch=job.batch,
    )
    if earlier is not None:
        earlier.check_same_run(job.recipe, inputs)
        return earlier
    return Manifest(
        source=type(model).__name__ if isinstance(model, nn.Module) else str(model),
        recipe=job.recipe,
        inputs=inputs,
        versions=versions(),
        hardware=describe_hardware(job.device),
        left_dense=job.left_dense,
    )


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute on `count` threads of the processor for a while; None changes nothing."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
