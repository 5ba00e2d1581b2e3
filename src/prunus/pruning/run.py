"""The story of one pruning run.

    checkpoint ──► skeleton (no weights) ──► how the model calls each block
    text ──► calibration windows ──► embeddings ──► hidden states

    for each block:  load weights ► walk the windows ► prune ► reconstruct ► write ► release

    head, if the recipe prunes it ──► pruned checkpoint + manifest

`run` tells this story from top to bottom. If torchrun started several processes, each takes its
share of the windows through the whole model. All processes prune every linear alike, and rank 0
writes.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from prunus.calibration import Windows
from prunus.calibration.corpora import LOCAL_CORPORA, data_folder
from prunus.calibration.texts import are_texts
from prunus.distributed import SINGLE_PROCESS
from prunus.hardware.memory import HeapTrimmer, describe_hardware, peak_memory, versions
from prunus.hardware.sizes import parse_bytes
from prunus.pruning.allocation.allocate import allocate
from prunus.pruning.block.checks import StoredBlock
from prunus.pruning.block.prune_block import BlockPruner
from prunus.pruning.calibration_windows import calibration_windows, describe_given, run_inputs
from prunus.pruning.compressed_output import make_output
from prunus.pruning.compression import rate_control
from prunus.pruning.job import PruningJob, RunOptions
from prunus.pruning.manifest import Manifest
from prunus.pruning.output import Output
from prunus.pruning.overlap import BackgroundWrites, read_ahead, read_block
from prunus.pruning.plan import CheckedRun, check_run, find_earlier_run
from prunus.pruning.rank_checks import check_same_on_all_ranks
from prunus.pruning.recipe import Recipe
from prunus.pruning.recipe_options import RecipeOptions, recipe_from
from prunus.pruning.records import Walk
from prunus.runs.lock import locked_output
from prunus.runs.progress import Progress
from prunus.runs.progress_bar import ProgressBar, pruning_step, shows_progress

__all__ = ["compress", "prune", "run"]


@shows_progress("prune", pruning_step)
def prune(
    model: str | Path | nn.Module,
    output: str | Path | None = None,
    method: str | None = None,
    sparsity: float | None = None,
    *,
    pattern: str | None = None,
    calibration: str | Path | torch.Tensor | Sequence[Any] | None = None,
    recipe: Recipe | str | Path | None = None,
    device: str = "auto",
    memory: str | int | None = None,
    data_dir: str | Path | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool | None = None,
    rank_timeout: float | None = None,
    progress: Callable[[Progress], None] | bool | None = True,
    **recipe_options: Unpack[RecipeOptions],
) -> Manifest:
    """Prune a model after training. Under torchrun all processes make the same call.

    Args:
        model: A checkpoint folder or a hub id, which is read block by block; or a loaded
            transformers model, which is pruned in place with the same result.
        output: Folder of the pruned checkpoint. None for a loaded model: call its
            `save_pretrained` afterwards.
        method: magnitude, wanda (default), wanda-variant, ria, sparsegpt, obs or alps.
        sparsity: Share of the weights of each linear to remove, in [0, 1); default 0.5.
        pattern: "N:M" keeps at most N of every M consecutive inputs, instead of `sparsity`.
        calibration: A source (see `prunus.calibration.SOURCES`; default "c4"), token ids (samples,
            seqlen), or texts: a list of strings, a data set with a column `text` or `messages`, or
            a list of chats, each a list of messages with `role` and `content`. For an image
            classifier a folder of images, or pixel values (samples, channels, height, width).
        recipe: A `Recipe`, or a TOML file with any of its options; other arguments override it.
        device: auto, cpu, cuda or cuda:i.
        memory: Memory budget, such as "8GB" or a number of bytes; default is the free memory.
        data_dir: Folder with local copies of the calibration corpora.
        tokenizer: The model's tokenizer or image processor; default is the checkpoint's own, for a
            loaded model that of its `name_or_path`.
        trust_remote_code: Run model code that comes with the checkpoint.
        overwrite: Replace an earlier result of prunus in `output`.
        resume: True requires an unfinished run in `output`, False refuses one. By default a
            matching unfinished run is resumed.
        rank_timeout: Under torchrun, a process without a sign of life counts as lost after this
            many seconds; default 600.
        progress: True shows a bar on a terminal or in a notebook, and nothing elsewhere. A function
            is called after every block with a `prunus.runs.progress.Progress`; under torchrun
            on rank 0.
        **recipe_options: The other options of `Recipe`; see `RecipeOptions`.

    Returns:
        The manifest: recipe, inputs, totals, and for each linear its shape, sparsity, error and
        seconds. In a checkpoint it is also the file `prunus.json`.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, OSError: Before any
            work where possible; says what was given, what is wrong and what to do.
        RankError: Under torchrun, another process was lost or failed; names it.
    """
    overrides: dict[str, Any] = {"method": method, "sparsity": sparsity, "pattern": pattern}
    overrides |= recipe_options
    given = calibration if isinstance(calibration, torch.Tensor) else None
    overrides |= describe_given(calibration)
    options = RunOptions(
        device=device,
        memory=parse_bytes(memory) if isinstance(memory, str) else memory,
        data_dir=Path(data_dir) if data_dir is not None else None,
        tokenizer=tokenizer,
        input_ids=given,
        texts=calibration if are_texts(calibration) else None,
        announce=progress.say if isinstance(progress, ProgressBar) else None,
        trust_remote_code=trust_remote_code,
        rank_timeout=rank_timeout,
    )
    return run(
        model,
        Path(output) if output is not None else None,
        recipe_from(recipe, overrides),
        options,
        overwrite=overwrite,
        resume=resume,
        progress=progress if callable(progress) else None,
    )


def compress(model: str | Path, output: str | Path, bits: float, **options: Any) -> Manifest:
    """Compress a checkpoint to a number of bits per weight. The result is a packed checkpoint.

    Args:
        model: A checkpoint folder or a hub id.
        output: Folder of the compressed checkpoint.
        bits: Bits per weight of the linears in the file, with all that belongs to them.
        **options: Any argument of `prune`. A sparsity or a pattern forces zeros; without them,
            zeros follow from the rate.

    Returns:
        The manifest, as of `prune`; its totals have the bits that the linears take.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, OSError: As `prune`.
    """
    return prune(model, output, bits=bits, **options)


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
    """Carry out a recipe. The arguments and errors are those of `prune`."""
    with options.with_ranks() as joint_options, contextlib.ExitStack() as stack:
        started = time.perf_counter()
        _check_destination(model, output)
        if output is not None:
            ranks = joint_options.ranks or SINGLE_PROCESS

            def look() -> None:
                find_earlier_run(Path(str(model)), output, recipe, overwrite, resume)

            # What the folder holds decides what is done: from here on no other run may change it.
            stack.enter_context(locked_output(output, ranks, look))
        checked = check_run(
            model, output, recipe, joint_options, overwrite=overwrite, resume=resume
        )
        destination = make_output(checked.job, output)
        return _prune_model(checked, destination, overwrite, started, progress)


def _prune_model(
    checked: CheckedRun,
    output: Output,
    overwrite: bool,
    started: float,
    progress: Callable[[Progress], None] | None,
) -> Manifest:
    """The run itself, after all checks, while no other run can use the output.

    Args:
        checked: What to do, and the manifest of the run to resume, if any.
        output: Where the pruned weights go.
        overwrite: Whether an earlier result in the output is replaced.
        started: When the run started, by `time.perf_counter`.
        progress: Called after every block.
    """
    job = checked.job
    ranks = job.ranks

    # The calibration windows, and the manifest that says which run this is.
    if job.needs_inputs:
        job.options.tell(f"drawing calibration windows from {job.recipe.calibration}")
    with ranks.fail_together():
        windows = calibration_windows(job)
        manifest = _manifest(job, windows, checked.earlier)
    walks = check_same_on_all_ranks(job, manifest)
    if manifest.state == "finished":
        output.check_finished()
        return manifest

    # The sparsity of every linear. A resumed run takes it from its manifest.
    if not manifest.allocation:
        with ranks.fail_together():
            manifest.allocation = allocate(job, windows.ids)
        manifest.allocation = ranks.on_rank_0(lambda: manifest.allocation)

    output.begin(manifest, overwrite)
    settings = job.block_settings(manifest.allocation)
    rate = rate_control(job, windows.ids, output, manifest)
    pruner = BlockPruner(job.skeleton, job.source, settings, ranks, rate)
    one_thread = 1 if job.reference_order else None

    def report(index: int, message: str) -> None:
        if progress is not None and ranks.rank == 0:
            progress(_progress(job, index, message, started))

    with torch.no_grad(), contextlib.closing(pruner), _threads(one_thread):
        # Everything before the first block: windows become hidden states.
        batches = windows.ids.split(job.batch) if len(windows.ids) else ()
        embedding = f"embedding {len(windows.ids)} windows and " if batches else ""
        job.options.tell(f"{embedding}reading block 0")
        pruner.embed(
            batches,
            spill_to=output.spill_folder if job.spills else None,
            on_device=job.hidden_states_stay,
        )

        # Resume: the stored weights of a finished block take the windows to the next block. The
        # reference order is the exception. There the next block depends on weights before they were
        # rounded for storage, so a finished block is pruned once more.
        taken = 0 if job.reference_order else output.finished_blocks
        for index in range(taken):
            pruner.propagate(index, output.read_block(index))
            report(index, "taken from the earlier run")

        heap = HeapTrimmer()
        left = range(taken, len(job.skeleton))
        with BackgroundWrites(job.overlaps) as writes:
            blocks = read_ahead(left, functools.partial(read_block, job), job.overlaps)
            for index, stored in zip(left, blocks, strict=True):
                message = _prune_block(job, pruner, output, writes, index, stored, walks[index])
                if ranks.size > 1:
                    heap.trim_if_grown()
                report(index, message)

        pruned_head: dict[str, torch.Tensor] = {}
        if job.recipe.head:
            pruned_head, manifest.head = pruner.prune_head(batches)

    manifest.close(seconds=time.perf_counter() - started, device=job.device)
    output.finish(pruned_head)
    return manifest


def _prune_block(
    job: PruningJob,
    pruner: BlockPruner,
    output: Output,
    writes: BackgroundWrites,
    index: int,
    stored: StoredBlock,
    walk: Walk,
) -> str:
    """Load, walk, prune, reconstruct, write and release one block; returns a progress message."""
    started = time.perf_counter()
    finished = pruner.prune(index, stored, job.selected[index], walk)
    record = finished.record
    record.seconds = round(time.perf_counter() - started, 3)
    # A finished block that is pruned once more keeps its shard.
    if index >= output.finished_blocks:
        writes.submit(lambda: output.write_block(index, stored.tensors, finished))
    message = f"pruned in {record.seconds:.2f} s"
    if record.walk == "replay":
        message += ", with one batch in flight: paused windows do not fit in the memory budget"
    return message


def _manifest(job: PruningJob, windows: Windows, earlier: Manifest | None) -> Manifest:
    """A new manifest, or the manifest of the run that is resumed.

    Raises:
        FileExistsError: The earlier run had other inputs.
    """
    inputs = run_inputs(job, windows)
    if earlier is not None:
        earlier.check_same_run(job.recipe, inputs)
        return earlier
    return Manifest(
        source=job.model_name,
        recipe=job.recipe,
        inputs=inputs,
        versions=versions(),
        hardware=describe_hardware(job.device),
        data_dir=_data_dir(job),
        left_dense=job.left_dense,
    )


def _data_dir(job: PruningJob) -> str | None:
    """The folder of local datasets that the calibration text came from, if it came from one."""
    is_corpus = job.recipe.calibration in LOCAL_CORPORA
    folder = data_folder(job.options.data_dir) if job.needs_inputs and is_corpus else None
    return None if folder is None else str(folder.absolute())


def _progress(job: PruningJob, index: int, message: str, started: float) -> Progress:
    return Progress(
        done=index + 1,
        total=len(job.skeleton),
        message=f"{job.skeleton.block_name(index)} {message}",
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(job.device),
    )


def _check_destination(model: str | Path | nn.Module, output: Path | None) -> None:
    """Check that a checkpoint comes with an output folder, and a loaded model without one.

    Raises:
        ValueError: It is the other way round.
    """
    if isinstance(model, nn.Module) and output is not None:
        raise ValueError(
            "a loaded model is pruned in place: leave output out and call its save_pretrained "
            "afterwards"
        )
    if not isinstance(model, nn.Module) and output is None:
        raise ValueError("a checkpoint is pruned into a new folder: give output")


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute on `count` processor threads while the `with` lasts; None changes nothing."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
