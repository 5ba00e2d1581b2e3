"""The story of one run of shrink.

    checkpoint ──► the model without weights ──► a search for blocks, or for a target
                                                   │
    for each block that stays:  load ► measure ► choose ► cut ► repair ► write

    smaller checkpoint + config.json + prunus-structure.json

A killed run resumes after the blocks that are finished.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prunus.calibration.windows import Windows
from prunus.hardware.memory import describe_hardware, peak_memory, versions
from prunus.options import takes
from prunus.runs.folder import find_earlier, held
from prunus.runs.loop import run_blocks
from prunus.runs.options import RunOptions
from prunus.runs.plan import check_room, check_same_on_all_ranks
from prunus.runs.progress import pruning_step, shows_progress
from prunus.runs.windows import calibration_windows, given_windows, run_inputs
from prunus.structure.blocks import choose_blocks
from prunus.structure.output import SmallerFolder
from prunus.structure.plan import StructureJob, plan_structure
from prunus.structure.recipe import StructureRecipe
from prunus.structure.record import SearchStep, StructureRecord
from prunus.structure.step import ShrinkStep
from prunus.structure.target_search import TargetSearch


@shows_progress("shrink", pruning_step)
@takes(StructureRecipe, RunOptions)
def shrink(
    model: str | Path,
    output: str | Path,
    *,
    calibration: str | Path | torch.Tensor | Sequence[Any] | None = None,
    recipe: StructureRecipe | str | Path | None = None,
    **options: Any,
) -> StructureRecord:
    """Make a model smaller by removing whole parts. The result is an ordinary checkpoint.

    Args:
        model: A checkpoint folder or a hub id.
        output: Folder of the smaller checkpoint.
        calibration: A source of windows, token ids or texts, as for `prunus.prune`.
        recipe: A `StructureRecipe`, or a TOML file with any of its options.
        **options: Options of `StructureRecipe` and of the run.

    Returns:
        The record of the run, which is also the file `prunus-structure.json` in `output`.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, OSError: As `prune`.
    """
    how, given = RunOptions.pick(options)
    data, described = given_windows(calibration)
    chosen = StructureRecipe.read(recipe, given | described)
    return run(model, Path(output), chosen, RunOptions(**how, **data))


def run(
    model: str | Path,
    output: Path,
    recipe: StructureRecipe,
    options: RunOptions,
    found: Sequence[SearchStep] = (),
) -> StructureRecord:
    """Carry out a recipe. The other arguments and errors are those of `shrink`.

    Args:
        found: The first steps of the search for blocks, which an earlier search has taken.
    """
    started = time.perf_counter()
    with options.with_ranks() as joint, contextlib.ExitStack() as stack:
        ranks = joint.processes

        def find() -> StructureRecord | None:
            return find_earlier(StructureRecord, output, recipe, joint, Path(str(model)))

        earlier = stack.enter_context(held(StructureRecord, output, ranks, find))
        with ranks.fail_together():
            decided_dtype = earlier.inputs.dtype if earlier is not None else None
            job = plan_structure(model, recipe, joint, decided_dtype)
        ranks.on_rank_0(lambda: check_room(job, output))
        return _run(job, output, earlier, found, started)


def _run(
    job: StructureJob,
    folder: Path,
    earlier: StructureRecord | None,
    found: Sequence[SearchStep],
    started: float,
) -> StructureRecord:
    """The run itself, after all checks, while no other run can use the output."""
    job.options.tell(f"drawing calibration windows from {job.recipe.calibration}")
    with job.ranks.fail_together():
        windows = calibration_windows(job)
        record = _record(job, windows, earlier, found)
    walks = check_same_on_all_ranks(job, record)
    output = SmallerFolder(folder, record, job)
    if record.state == "finished":
        output.check_finished()
        return record
    output.begin(job.options.overwrite)
    job.measured = record.measured
    with torch.no_grad():
        if job.target is not None:
            kept, job.width = TargetSearch(job, windows.ids, record, output.save, folder).run()
        else:
            kept = choose_blocks(job, windows.ids, record.search, output.save)
        smaller = output.smaller = job.smaller(kept)
        record.config = _changes(job.raw, smaller.config)
        step = ShrinkStep(job, smaller, windows.ids, walks, folder)
        with contextlib.closing(step):
            names = smaller.skeleton.block_name
            run_blocks(job, step, output, output.finished, made_from=kept, names=names)
    record.totals = {
        "seconds": round(time.perf_counter() - started, 2),
        "peak_memory_bytes": peak_memory(),
    }
    output.complete()
    return record


def _record(
    job: StructureJob,
    windows: Windows,
    earlier: StructureRecord | None,
    found: Sequence[SearchStep],
) -> StructureRecord:
    """A new record with the steps that are found, or the record of the run that is resumed."""
    inputs = run_inputs(job, windows)
    if earlier is not None:
        earlier.check_same_run(job.recipe, inputs)
        return earlier
    return StructureRecord(
        source=job.model_name,
        recipe=job.recipe,
        inputs=inputs,
        versions=versions(),
        hardware=describe_hardware(job.device),
        search=list(found),
    )


def _changes(
    before: dict[str, Any], after: dict[str, Any], path: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Field of config.json that changed -> its values before and after.

    >>> _changes({"text": {"layers": 3}}, {"text": {"layers": 2}})
    {'text.layers': (3, 2)}
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            found |= _changes(old, value, f"{path}{key}.")
        elif old != value:
            found[f"{path}{key}"] = (old, value)
    return found
