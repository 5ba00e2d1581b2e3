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
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import RLock
from typing import Any, cast

import torch
from torch import nn

from prunus.calibration.corpora import LOCAL_SOURCES, data_folder
from prunus.calibration.windows import Windows
from prunus.hardware.sizes import counted
from prunus.methods.table import GIVEN, Method, method_sha256
from prunus.model.source import ModuleSource
from prunus.options import takes
from prunus.pruning.allocation import allocate
from prunus.pruning.block.linear import LinearFinish
from prunus.pruning.block.prune_block import BlockPruner
from prunus.pruning.job import PruningJob, plan_run
from prunus.pruning.manifest import Manifest, PruningRecord
from prunus.pruning.options import PruningOptions
from prunus.pruning.output import InPlaceOutput, PrunedFolder, PruningOutput
from prunus.pruning.recipe import Recipe
from prunus.runs.folder import find_earlier, held, resumed_or_new
from prunus.runs.loop import run_blocks
from prunus.runs.options import RunOptions
from prunus.runs.plan import check_room, check_same_on_all_ranks
from prunus.runs.progress import pruning_step, shows_progress
from prunus.runs.windows import calibration_windows, given_windows, run_inputs

#: Held by the run that computes on one processor thread.
_ONE_THREAD = RLock()


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
    return cast(Manifest, carry_out(model, output, recipe, options, PruneVerb()))


class PruneVerb:
    """What prune and compress do differently: their job, their folder, and the end of a linear."""

    job: type[PruningJob] = PruningJob

    def output(self, folder: Path | None, record: PruningRecord, job: PruningJob) -> PruningOutput:
        """Where the run puts what it has pruned."""
        if isinstance(job.source, ModuleSource):
            assert isinstance(record, Manifest)
            return InPlaceOutput(job.source, record)
        assert folder is not None, "a checkpoint is pruned into a folder"
        return PrunedFolder(folder, record, job)

    def finish_linear(
        self, job: PruningJob, ids: torch.Tensor, output: PruningOutput, record: PruningRecord
    ) -> LinearFinish | None:
        """What is done to a linear after its zeros are chosen; None for nothing."""
        return None


def carry_out(
    model: str | Path | nn.Module,
    output: Path | None,
    recipe: PruningOptions,
    options: RunOptions,
    verb: PruneVerb,
) -> PruningRecord:
    """Carry out a recipe of prune or of a verb that builds on it."""
    kind = verb.job.RECORD
    with options.with_ranks() as joint, contextlib.ExitStack() as stack:
        started, earlier = time.perf_counter(), None
        if output is not None:
            # What the folder holds decides what is done: from here on no other run may change it.
            earlier = stack.enter_context(
                held(
                    kind,
                    output,
                    joint.processes,
                    lambda: find_earlier(kind, output, recipe, joint, Path(str(model))),
                )
            )
        with joint.processes.fail_together():
            # A resumed run keeps its dtype: the trial behind "auto" need not be repeated.
            decided_dtype = earlier.inputs.dtype if earlier is not None else None
            job = plan_run(model, recipe, joint, verb.job, decided_dtype)
        if output is not None:
            joint.processes.on_rank_0(lambda: check_room(job, output))
        return _carry_out(job, output, earlier, verb, started)


def planned(
    model: str | Path,
    output: Path | None,
    recipe: PruningOptions,
    options: RunOptions,
    kind: type[PruningJob] = PruningJob,
) -> PruningJob:
    """The job of such a run. Checks what the run checks, and writes nothing."""
    if output is not None:
        find_earlier(kind.RECORD, output, recipe, options, Path(model))
    job = plan_run(model, recipe, options, kind)
    if output is not None:
        check_room(job, output)
    return job


def _carry_out(
    job: PruningJob,
    folder: Path | None,
    earlier: PruningRecord | None,
    verb: PruneVerb,
    started: float,
) -> PruningRecord:
    """The run itself, after all checks, while no other run can use the output."""
    ranks = job.ranks
    # The calibration windows, and the record that says which run this is.
    if job.needs_inputs:
        job.options.tell(f"drawing calibration windows from {job.recipe.calibration}")
    with ranks.fail_together():
        windows = calibration_windows(job)
        record = _record(job, windows, earlier)
    walks = check_same_on_all_ranks(job, record)
    output = verb.output(folder, record, job)
    if record.state == "finished":
        output.check_finished()
        return record

    job.measured = record.measured
    # The sparsity of every linear. A resumed run takes it from its record.
    if not record.allocation:
        with ranks.fail_together():
            record.allocation = allocate(job, windows.ids)
        record.allocation = ranks.on_rank_0(lambda: record.allocation)

    output.begin(job.options.overwrite)
    finish = verb.finish_linear(job, windows.ids, output, record)
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
        if job.prunes_head:
            pruned_head, record.head = pruner.prune_head(batches)
    record.close(seconds=time.perf_counter() - started, device=job.device)
    output.complete(pruned_head)
    return record


def _record(job: PruningJob, windows: Windows, earlier: PruningRecord | None) -> PruningRecord:
    """A new record, or the record of the run that is resumed."""
    own_sha256 = method_sha256(job.recipe.method, job.options.own_method)
    inputs = run_inputs(job, windows).model_copy(update={"method_sha256": own_sha256})
    own = {"source": job.model_name, "data_dir": _data_folder(job), "left_dense": job.left_dense}
    return resumed_or_new(job.RECORD, earlier, job.recipe, inputs, job.device, **own)


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
