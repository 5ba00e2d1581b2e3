"""The story of one run of prune or compress.

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
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from prunus.calibration.corpora import LOCAL_SOURCES, data_folder
from prunus.calibration.windows import Windows
from prunus.engine.allocation import allocate
from prunus.engine.block.prune_block import BlockPruner
from prunus.engine.folder import drawn_and_recorded, held
from prunus.engine.linear_job import LinearSelection, PruningJob, Storage, plan_run
from prunus.engine.linear_options import LinearOptions, PruningOptions
from prunus.engine.linear_record import PruningRecord
from prunus.engine.loop import run_blocks
from prunus.engine.options import RunOptions
from prunus.engine.output import CheckpointFolder, InPlaceOutput, PruningOutput, Rounding
from prunus.engine.plan import OpenModel, check_room, check_same_on_all_ranks
from prunus.engine.record import Walk
from prunus.engine.result import Result
from prunus.engine.session import Session
from prunus.hardware.memory import peak_memory
from prunus.hardware.sizes import counted
from prunus.kernels.library import missing_words
from prunus.methods.table import method_sha256
from prunus.model.source import ModuleSource

# Held by the run that computes on one processor thread.
_ONE_THREAD = RLock()
_Record = TypeVar("_Record", bound=PruningRecord)
#: Chooses how each linear is rounded. It is called once, before the first block, with the job, its
#: session, the calibration windows, the folder, which keeps measurements, and the record.
RoundingOf = Callable[[PruningJob, Session, torch.Tensor, CheckpointFolder, _Record], Rounding]


@dataclass(frozen=True)
class LinearCommand(Generic[_Record]):
    """What a command does with the linears of a model, as `carry_out` must know it.

    Attributes:
        kind: The class of its record.
        storage_of: Plans how the result stores linears.
        rounding: Chooses how each linear is rounded; None for a run that rounds none.
        after: Called on all processes with the record of the finished result, which it may extend,
            before any other run may change the result; None for nothing.
    """

    kind: type[_Record]
    storage_of: Callable[[OpenModel, LinearSelection], Storage]
    rounding: RoundingOf[_Record] | None = None
    after: Callable[[_Record, Session], None] | None = None


def carry_out(
    command: LinearCommand[_Record],
    model: str | Path | nn.Module,
    result: Result[_Record] | None,
    recipe: LinearOptions,
    options: RunOptions,
    session: Session,
) -> _Record:
    """Carry out a recipe, and return the record of the run.

    Args:
        command: What is done with the linears.
        model: A checkpoint folder, a hub id, or a loaded model.
        result: Where the result is written; None changes a loaded model in place.
        recipe: The options that decide the bytes of the result.
        options: The options that only decide how the work is done.
        session: Who hears of the progress. All processes that torchrun started join it.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, OSError: Before any
            work where possible; says what was given, what is wrong and what to do.
        RankError: Under torchrun, another process was lost or failed; names it.
    """
    with session.joined(options.rank_timeout) as joint:
        ranks = joint.ranks
        if result is None:
            return _carry_out_held(command, model, None, recipe, options, joint, None)
        name = str(model)
        result.check(name)
        # What the folder holds decides what is done: from here on no other run may change it.
        find = functools.partial(result.earlier, name, recipe, options)
        with held(command.kind, result.folder, ranks, find) as earlier:
            if earlier is not None and result.is_complete(earlier):
                record = earlier
            else:
                record = _carry_out_held(command, model, result, recipe, options, joint, earlier)

            if command.after is not None:
                command.after(record, joint)

            def close() -> dict[str, Any]:
                result.close()
                return record.model_dump(mode="json")

            return command.kind.model_validate(ranks.on_rank_0(close))


def _carry_out_held(
    command: LinearCommand[_Record],
    model: str | Path | nn.Module,
    result: Result[_Record] | None,
    recipe: LinearOptions,
    options: RunOptions,
    session: Session,
    earlier: _Record | None,
) -> _Record:
    """Carry out a recipe into a folder that this run holds, and go on with an `earlier` run."""
    started = time.perf_counter()
    ranks = session.ranks
    with ranks.fail_together():
        # A resumed run keeps its dtype: the trial behind "auto" need not be repeated.
        decided_dtype = earlier.inputs.dtype if earlier is not None else None
        job = plan_run(model, recipe, options, command.storage_of, session, decided_dtype)
    if result is not None:
        ranks.on_rank_0(lambda: check_room(job.disk_bytes(), result.folder))
    if job.device.type == "cpu" and job.needs == "gram" and (words := missing_words()):
        session.tell(words)
    code_sha256 = None
    if isinstance(recipe, PruningOptions):
        code_sha256 = method_sha256(recipe.method, options.own_method)
    # The folder of local datasets that the calibration text was read from, if any.
    is_local = job.needs_inputs and recipe.calibration in LOCAL_SOURCES
    data = data_folder(options.data) if is_local else None
    fields: dict[str, Any] = {
        "data_dir": None if data is None else str(data.absolute()),
        "left_dense": job.left_dense,
        "grid_bits": job.grid_bits,
        "shard_count": 0 if isinstance(job.source, ModuleSource) else job.source.shard_count,
    }
    windows, record = drawn_and_recorded(command.kind, job, session, earlier, code_sha256, **fields)
    output: PruningOutput
    if result is not None:
        output = CheckpointFolder(record, job, ranks, result)
    else:
        assert isinstance(job.source, ModuleSource), "a checkpoint is pruned into a folder"
        output = InPlaceOutput(job.source, record, job.storage)
    _change_blocks(job, session, windows, record, output, command.rounding, started)
    return record


def planned(
    command: LinearCommand[_Record],
    model: str | Path,
    result: Result[_Record] | None,
    recipe: LinearOptions,
    options: RunOptions,
) -> PruningJob:
    """The job that `carry_out` would do with these arguments; nothing is written.

    `result` None leaves out the checks of the output. The errors are those of `carry_out`.
    """
    if result is None:
        return plan_run(model, recipe, options, command.storage_of)
    result.check(model)
    result.earlier(model, recipe, options)
    job = plan_run(model, recipe, options, command.storage_of)
    check_room(job.disk_bytes(), result.folder)
    return job


def _change_blocks(
    job: PruningJob,
    session: Session,
    windows: Windows,
    record: _Record,
    output: PruningOutput,
    rounding: RoundingOf[_Record] | None,
    started: float,
) -> None:
    """The run itself, after all checks, while no other run can use the output."""
    ranks, recipe = session.ranks, job.recipe
    wanted: list[Walk] = ["two_pass"] * len(job.skeleton) if recipe.plan.two_passes else job.walks
    walks = check_same_on_all_ranks(recipe, record, ranks, wanted)
    if record.state == "finished":
        output.check_finished()
        return

    # The sparsity of every linear. A resumed run takes it from its record.
    if not record.allocation:
        with ranks.fail_together():
            record.allocation = allocate(job, session, windows.ids, record.measured)
        record.allocation = ranks.on_rank_0(lambda: record.allocation)

    output.begin(job.options.overwrite)
    rounded = None
    if rounding is not None:
        assert isinstance(output, CheckpointFolder), "a loaded model is not rounded"
        rounded = rounding(job, session, windows.ids, output, record)
        output = CheckpointFolder(record, job, ranks, output.result, rounded)
    output.write_known()
    round_as = None if rounded is None else rounded.of
    pruner = BlockPruner(job, session, walks, record.allocation, round_as)
    in_order = job.work.reference_order
    threads = _one_processor_thread() if in_order else contextlib.nullcontext()
    with torch.no_grad(), contextlib.closing(pruner), threads:
        # Everything before the first block: windows become hidden states.
        batches = windows.ids.split(job.batch) if job.walks_windows else ()
        embedding = f"embedding {counted(len(windows.ids), 'window')} and " if batches else ""
        session.tell(f"{embedding}reading block 0")
        pruner.embed(batches, output.folder)
        # In the reference order the next block depends on weights before they were rounded for
        # storage, so a finished block is pruned once more.
        run_blocks(job, session, pruner, output, record.measured, again=in_order)
        pruned_head: dict[str, torch.Tensor] = {}
        if recipe.plan.head:
            pruned_head, record.head = pruner.prune_head(batches)
        needs_head = rounded is not None and rounded.needs_head
        head = pruner.head_statistics(batches) if needs_head else None
    record.totals = record.summary() | {
        "seconds": round(time.perf_counter() - started, 2),
        "peak_memory_bytes": peak_memory(),
    }
    if job.device.type == "cuda":
        record.totals["peak_device_memory_bytes"] = peak_memory(job.device)
    output.complete(pruned_head, head)


@contextlib.contextmanager
def _one_processor_thread() -> Iterator[None]:
    """Compute on one processor thread while the `with` lasts, one run after the other.

    torch has one number of threads for the whole process, and one for each thread of Python. If two
    runs changed it at the same time, neither could put back what was there before.
    """
    with _ONE_THREAD:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)
