"""The story of one run of prune, which compress follows too.

    checkpoint ──► skeleton (no weights) ──► how the model calls each block
    text ──► calibration windows ──► embeddings ──► hidden states

    for each block:  load weights ► walk the windows ► prune ► reconstruct ► write ► release

    head, if the recipe prunes it ──► pruned checkpoint + record

`carry_out` tells this story from top to bottom. If torchrun started several processes, each runs
its share of the windows through the whole model. All processes prune every linear equally, and
rank 0 writes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

import torch
from torch import nn

from prunus.calibration.corpora import LOCAL_SOURCES, data_folder
from prunus.calibration.windows import Windows
from prunus.hardware.sizes import counted
from prunus.methods.table import GIVEN, Method, method_sha256
from prunus.model.kinds import kind_of
from prunus.model.source import ModuleSource
from prunus.options import takes
from prunus.pruning.allocation import allocate
from prunus.pruning.block.linear import LinearFinish
from prunus.pruning.block.prune_block import BlockPruner
from prunus.pruning.job import Format, PruningJob, plan_run
from prunus.pruning.manifest import Manifest, PruningRecord, grid_words, pruned_card
from prunus.pruning.options import PruningOptions
from prunus.pruning.output import CheckpointFolder, InPlaceOutput, PruningOutput
from prunus.pruning.recipe import Recipe
from prunus.runs.folder import held, resumed_or_new
from prunus.runs.loop import run_blocks
from prunus.runs.options import RunOptions
from prunus.runs.plan import check_room, check_same_on_all_ranks
from prunus.runs.progress import pruning_step, shows_progress
from prunus.runs.windows import calibration_windows, given_windows, run_inputs

#: Held by the run that computes on one processor thread.
_ONE_THREAD = RLock()
_Record = TypeVar("_Record", bound=PruningRecord)
#: Makes what is done to every linear after its zeros are chosen, or None for nothing. It is called
#: once, before the first block, with the job, the calibration windows, the output and the record.
RoundingOf = Callable[[PruningJob, torch.Tensor, PruningOutput, _Record], LinearFinish | None]


def no_rounding(*_: Any) -> None:
    """Prune leaves the remaining weights as they are."""


@shows_progress("prune", pruning_step)
@takes(Recipe, RunOptions)
def prune(
    model: str | Path | nn.Module,
    output: str | Path | None = None,
    method: str | Method | None = None,
    sparsity: float | None = None,
    *,
    calibration: str | Path | torch.Tensor | Sequence[Any] | None = None,
    recipe: Recipe | str | Path | None = None,
    **options: Any,
) -> Manifest:
    """Prune a checkpoint into a new folder, or a loaded model in place.

    Args:
        model: A checkpoint folder, a hub id, or a loaded transformers model.
        output: Folder of the pruned checkpoint; None for a loaded model.
        method: How weights are chosen: the name of a method, FILE.py:NAME for your own in a file,
            or a `prunus.methods.Method`.
        sparsity: Share of each linear's weights to remove.
        calibration: A source of windows by name or file, token ids (samples, seqlen), pixel values
            (samples, channels, height, width), texts, rows of a data set, or chats.
        recipe: A `Recipe`, or a TOML file with any of its options.
        **options: Options of `Recipe` and of the run.

    Returns:
        The manifest: recipe, inputs, totals, and for each linear its shape, sparsity, error and
        seconds. In a checkpoint it is also the file `prunus.json`.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, OSError: Before any
            work where possible; says what was given, what is wrong and what to do.
        RankError: Under torchrun, another process was lost or failed; names it.
    """
    how, given = RunOptions.pick(options)
    data, described = given_windows(calibration)
    if isinstance(method, Method):
        how["own_method"], method = method, f"{GIVEN}{method.name}"
    chosen = Recipe.read(recipe, {"method": method, "sparsity": sparsity} | given | described)
    folder = Path(output) if output is not None else None
    return run(model, folder, chosen, RunOptions(**how, **data))


def run(
    model: str | Path | nn.Module, output: Path | None, recipe: Recipe, options: RunOptions
) -> Manifest:
    """Carry out a recipe. The arguments and errors are those of `prune`."""
    if isinstance(model, nn.Module) and output is not None:
        raise ValueError(
            "a loaded model is pruned in place: leave output out and call its save_pretrained "
            "afterwards"
        )
    if not isinstance(model, nn.Module) and output is None:
        raise ValueError("a checkpoint is pruned into a new folder: give output")
    return carry_out(Manifest, model, output, recipe, options, PlainTensors())


class PlainTensors(Format[Manifest]):
    """The format of a pruned checkpoint: tensors and configuration are those of the source."""

    def card(self, record: Manifest) -> str:
        source = self.job.source
        folder = None if isinstance(source, ModuleSource) else source.checkpoint.folder
        nbytes = None if folder is None else self.file_bytes()
        return pruned_card(record, kind_of(source.config).loader, folder, nbytes)


def carry_out(
    kind: type[_Record],
    model: str | Path | nn.Module,
    output: Path | None,
    recipe: PruningOptions,
    options: RunOptions,
    stored: Format[_Record],
    rounding: RoundingOf[_Record] = no_rounding,
) -> _Record:
    """Carry out a recipe of prune or compress.

    Args:
        kind: The record of the command.
        stored: How the result stores linears.
        rounding: Makes what rounds every linear after its zeros are chosen; see `RoundingOf`.
    """
    with options.with_ranks() as joint:
        if output is None:
            return _carry_out_held(kind, model, None, recipe, joint, stored, rounding, None)
        name, folder = str(model), stored.folder(str(model), output)

        def find() -> _Record | None:
            return stored.earlier(kind, name, folder, recipe, joint)

        # What the folder holds decides what is done: from here on no other run may change it.
        with held(kind, folder, joint.processes, find) as earlier:
            if earlier is not None and stored.is_complete(earlier):
                record = earlier
            else:
                record = _carry_out_held(
                    kind, model, folder, recipe, joint, stored, rounding, earlier
                )
            joint.processes.on_rank_0(lambda: stored.close(folder))
            return record


def _carry_out_held(
    kind: type[_Record],
    model: str | Path | nn.Module,
    output: Path | None,
    recipe: PruningOptions,
    joint: RunOptions,
    stored: Format[_Record],
    rounding: RoundingOf[_Record],
    earlier: _Record | None,
) -> _Record:
    """Carry out a recipe into a folder that this run holds, and go on with an `earlier` run."""
    started = time.perf_counter()
    with joint.processes.fail_together():
        # A resumed run keeps its dtype: the trial behind "auto" need not be repeated.
        decided_dtype = earlier.inputs.dtype if earlier is not None else None
        job = plan_run(model, recipe, joint, stored, decided_dtype)
    if output is not None:
        joint.processes.on_rank_0(lambda: check_room(job, output))
    # The calibration windows, and the record that says which run this is.
    if job.needs_inputs:
        job.options.tell(f"drawing calibration windows from {job.recipe.calibration}")
    with job.ranks.fail_together():
        windows = calibration_windows(job)
        record = _record(kind, job, windows, earlier)
    if record.grid_bits is not None:
        job.options.tell(grid_words(record.grid_bits))
    _change_blocks(job, windows, record, _output(job, output, record), rounding, started)
    return record


def planned(
    kind: type[_Record],
    model: str | Path,
    output: Path | None,
    recipe: PruningOptions,
    options: RunOptions,
    stored: Format[_Record],
) -> PruningJob:
    """The job of such a run. Checks what the run checks, and writes nothing."""
    folder = None if output is None else stored.folder(model, output)
    if folder is not None:
        stored.earlier(kind, model, folder, recipe, options)
    job = plan_run(model, recipe, options, stored)
    if folder is not None:
        check_room(job, folder)
    return job


def _output(job: PruningJob, folder: Path | None, record: PruningRecord) -> PruningOutput:
    """Where the run puts what it has changed."""
    if folder is not None:
        return CheckpointFolder(folder, record, job)
    assert isinstance(job.source, ModuleSource), "a checkpoint is pruned into a folder"
    return InPlaceOutput(job.source, record, job.format)


def _change_blocks(
    job: PruningJob,
    windows: Windows,
    record: _Record,
    output: PruningOutput,
    rounding: RoundingOf[_Record],
    started: float,
) -> None:
    """The run itself, after all checks, while no other run can use the output."""
    ranks = job.ranks
    walks = check_same_on_all_ranks(job, record)
    if record.state == "finished":
        output.check_finished()
        return

    job.measured = record.measured
    # The sparsity of every linear. A resumed run takes it from its record.
    if not record.allocation:
        with ranks.fail_together():
            record.allocation = allocate(job, windows.ids)
        record.allocation = ranks.on_rank_0(lambda: record.allocation)

    output.begin(job.options.overwrite)
    finish = rounding(job, windows.ids, output, record)
    pruner = BlockPruner(job, walks, record.allocation, finish)
    threads = _one_processor_thread() if job.reference_order else contextlib.nullcontext()
    with torch.no_grad(), contextlib.closing(pruner), threads:
        # Everything before the first block: windows become hidden states.
        batches = windows.ids.split(job.batch) if len(windows.ids) else ()
        embedding = f"embedding {counted(len(windows.ids), 'window')} and " if batches else ""
        job.options.tell(f"{embedding}reading block 0")
        pruner.embed(
            batches,
            spill_to=output.spill_folder if job.spills else None,
            on_device=job.hidden_states_stay,
        )
        # In the reference order the next block depends on weights before they were rounded for
        # storage, so a finished block is pruned once more.
        run_blocks(job, pruner, output, output.finished, again=job.reference_order)
        pruned_head: dict[str, torch.Tensor] = {}
        if job.recipe.prunes_head:
            pruned_head, record.head = pruner.prune_head(batches)
    record.close(seconds=time.perf_counter() - started, device=job.device)
    output.complete(pruned_head)


def _record(
    kind: type[_Record], job: PruningJob, windows: Windows, earlier: _Record | None
) -> _Record:
    """A new record, or the record of the run that is resumed."""
    own_sha256 = method_sha256(job.recipe.method, job.options.own_method)
    inputs = run_inputs(job, windows).model_copy(update={"method_sha256": own_sha256})
    own: dict[str, Any] = {
        "source": job.model_name,
        "data_dir": _data_folder(job),
        "left_dense": job.left_dense,
        "grid_bits": job.grid_bits,
        "shard_count": 0 if isinstance(job.source, ModuleSource) else job.source.shard_count,
    }
    return resumed_or_new(kind, earlier, job.recipe, inputs, job.device, **own)


def _data_folder(job: PruningJob) -> str | None:
    """The folder of local datasets that the calibration text was read from, if any."""
    is_local = job.recipe.calibration in LOCAL_SOURCES
    folder = data_folder(job.options.data) if job.needs_inputs and is_local else None
    return None if folder is None else str(folder.absolute())


@contextlib.contextmanager
def _one_processor_thread() -> Iterator[None]:
    """Compute on one processor thread while the `with` lasts, one run after the other.

    torch counts the processor threads of every thread of Python, and of all together. So two runs
    at the same time could not put back what they have changed.
    """
    with _ONE_THREAD:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)
