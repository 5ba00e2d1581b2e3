"""The story of one run that makes a model smaller.

    checkpoint ──► skeleton of the old model, skeleton of the smaller one
    text ──► calibration windows ──► embeddings ──► hidden states

    for each block:  load ► measure ► choose what goes ► cut ► repair ► write ► run what is left

    smaller checkpoint + config.json + prunus-structure.json

The hidden states are those of the smaller model. So every block is measured on what will reach it,
and a killed run goes on from the blocks that are finished.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.calibration.texts import are_texts
from prunus.calibration.windows import Windows
from prunus.distributed import SINGLE_PROCESS, own_part
from prunus.hardware.memory import HeapTrimmer, describe_hardware, peak_memory, versions
from prunus.hardware.sizes import parse_bytes
from prunus.model.checkpoint.output_folder import check_disk
from prunus.model.stream import Stream
from prunus.pruning.reconstruction.batches import step_parts
from prunus.runs.blocks import check_same, read_stored
from prunus.runs.folder import bytes_in
from prunus.runs.lock import locked_output
from prunus.runs.options import RunOptions
from prunus.runs.progress import Progress
from prunus.runs.rank_checks import check_same_on_all_ranks
from prunus.runs.windows import calibration_windows, describe_given, run_inputs
from prunus.structure.blocks import choose_blocks
from prunus.structure.experts import choose_experts
from prunus.structure.layout import axis_that_changes, cut, old_names, shapes_of
from prunus.structure.output import StructureOutput
from prunus.structure.plan import (
    SmallerModel,
    StructureJob,
    find_earlier_run,
    plan_structure,
)
from prunus.structure.recipe import StructureRecipe, load_structure_recipe
from prunus.structure.record import BlockChange, BlockStep, StructureRecord
from prunus.structure.repair import Repair
from prunus.structure.target_search import TargetSearch, remove_candidates, split_windows
from prunus.structure.width import narrow

__all__ = ["shrink", "shrink_by_recipe"]


def shrink(
    model: str | Path,
    output: str | Path,
    *,
    calibration: str | Path | torch.Tensor | Sequence[Any] | None = None,
    recipe: StructureRecipe | str | Path | None = None,
    device: str = "auto",
    memory: str | int | None = None,
    data_dir: str | Path | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool | None = None,
    progress: Callable[[Progress], None] | None = None,
    rank_timeout: float | None = None,
    **recipe_options: Any,
) -> StructureRecord:
    """Make a model smaller: whole parts go, and the result is an ordinary checkpoint.

    Args:
        model: a checkpoint folder or a hub id.
        output: folder of the smaller checkpoint.
        calibration: a source, token ids (samples, seqlen) or texts, as for `prunus.prune`.
        recipe: a `StructureRecipe`, or a TOML file with any of its options.
        device, memory, data_dir, tokenizer, trust_remote_code, overwrite, resume: as for
            `prunus.prune`.
        progress: called after every block.
        rank_timeout: under torchrun, as for `prunus.prune`.
        **recipe_options: options of `StructureRecipe`, such as `experts=0.25`.

    Returns:
        The record of the run, which is also the file `prunus-structure.json` in `output`.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, OSError: before any
            work where possible; says what was given, what is wrong and what is possible.
    """
    options = RunOptions(
        device=device,
        memory=parse_bytes(memory) if isinstance(memory, str) else memory,
        data=Path(data_dir) if data_dir is not None else None,
        tokenizer=tokenizer,
        input_ids=calibration if isinstance(calibration, torch.Tensor) else None,
        texts=calibration if are_texts(calibration) else None,
        trust_remote_code=trust_remote_code,
        rank_timeout=rank_timeout,
    )
    given = describe_given(calibration) | recipe_options
    return shrink_by_recipe(
        model,
        Path(output),
        load_structure_recipe(recipe, given),
        options,
        overwrite=overwrite,
        resume=resume,
        progress=progress,
    )


def shrink_by_recipe(
    model: str | Path,
    output: Path,
    recipe: StructureRecipe,
    options: RunOptions,
    *,
    overwrite: bool = False,
    resume: bool | None = None,
    progress: Callable[[Progress], None] | None = None,
    found: Sequence[BlockStep] = (),
) -> StructureRecord:
    """Carry out a recipe. The other arguments and errors are those of `shrink`.

    Args:
        found: the first steps of the search for blocks, which an earlier search has taken.
    """
    started = time.perf_counter()

    def look() -> dict[str, Any] | None:
        earlier = find_earlier_run(output, recipe, overwrite, resume)
        return None if earlier is None else earlier.model_dump(mode="json")

    with options.with_ranks() as joint_options, contextlib.ExitStack() as stack:
        ranks = joint_options.ranks or SINGLE_PROCESS
        stack.enter_context(locked_output(output, ranks, look))
        # Rank 0 alone looks at the folder, and tells the others as JSON.
        known = ranks.on_rank_0(look)
        earlier = None if known is None else StructureRecord.model_validate(known)
        with ranks.fail_together():
            decided = earlier.inputs.dtype if earlier is not None else None
            job = plan_structure(model, output, recipe, joint_options, decided)
        checkpoint = job.source.checkpoint
        needed = checkpoint.nbytes(checkpoint.tensors)
        ranks.on_rank_0(lambda: check_disk(output, needed - bytes_in(output)))
        written = StructureOutput(output, job)
        return _shrink(job, written, earlier, found, overwrite, started, progress)


def _shrink(
    job: StructureJob,
    output: StructureOutput,
    earlier: StructureRecord | None,
    found: Sequence[BlockStep],
    overwrite: bool,
    started: float,
    progress: Callable[[Progress], None] | None,
) -> StructureRecord:
    """The run itself, after all checks, while no other run can use the output."""
    measuring, ranks = job.measuring, job.ranks
    measuring.options.tell(f"drawing calibration windows from {job.recipe.calibration}")
    with ranks.fail_together():
        windows = calibration_windows(measuring)
        record = _record(job, windows, earlier, found)
    walks = check_same_on_all_ranks(measuring, record)
    if record.state == "finished":
        output.check_finished()
        return record
    taken = output.begin(record, overwrite)
    if overwrite:
        ranks.on_rank_0(lambda: remove_candidates(output.folder))

    def make_candidate(recipe: StructureRecipe, steps: int, folder: Path) -> None:
        rest = split_windows(windows.ids)[1]
        recipe = recipe.model_copy(update=describe_given(rest))
        options = measuring.options.model_copy(update={"input_ids": rest, "texts": None})
        source = measuring.model_name
        shrink_by_recipe(source, folder, recipe, options, found=record.search[:steps])

    if job.target is not None:
        search = TargetSearch(job, windows.ids, record, output.save, make_candidate, output.folder)
        kept = search.run()
    else:
        kept = choose_blocks(job, windows.ids, record.search, lambda _: output.save())
    smaller = job.smaller(kept)
    record.config = _changes(job.raw, smaller.config)

    def report(place: int, message: str) -> None:
        if progress is not None and ranks.rank == 0:
            name = smaller.skeleton.block_name(place)
            seconds = time.perf_counter() - started
            total, memory = len(smaller.made_from), peak_memory(measuring.device)
            progress(Progress(place + 1, total, f"{name} {message}", seconds, memory))

    stream, heap = Stream(smaller.skeleton, job.source, measuring.device), HeapTrimmer()
    with torch.no_grad(), contextlib.ExitStack() as stack:
        stack.callback(stream.close)
        # Without repair, blocks that go change no other block: then only what goes inside blocks
        # needs windows in the pass below.
        batches = windows.ids.split(measuring.batch) if job.measures_blocks else ()
        spill_to = output.folder if measuring.spills else None
        stays = measuring.hidden_states_stay
        parts = step_parts(batches, job.step_ranks(batches)) if job.recipe.repair else ()
        stream.embed(own_part(ranks, batches), spill_to, stays, parts)
        repair = None
        if job.recipe.repair:
            repair = Repair(job, smaller, stream, batches, walks, spill_to)
            stack.callback(repair.close)
        for place in range(len(smaller.made_from)):
            if repair is not None:
                repair.advance(place)
            if place < taken:
                tensors = output.read_block(smaller, place)
                message = "taken from the earlier run"
            else:
                tensors, change = _smaller_block(job, stream, smaller, place)
                if repair is not None:
                    tensors, change.repair = repair.train(place, tensors)
                check_same(ranks, change.name, tensors)
                output.write_block(smaller, place, tensors, change)
                message = f"made from block {change.made_from} in {_seconds(change):.2f} s"
            stream.propagate(place, tensors)
            heap.trim_if_grown()
            report(place, message)
    record.totals = {
        "seconds": round(time.perf_counter() - started, 2),
        "peak_memory_bytes": peak_memory(),
    }
    ranks.on_rank_0(lambda: remove_candidates(output.folder))
    output.finish(smaller)
    return record


def _smaller_block(
    job: StructureJob, stream: Stream, smaller: SmallerModel, place: int
) -> tuple[dict[str, Tensor], BlockChange]:
    """One block of the smaller model: its tensors by relative name, and what happened to it."""
    started, index = time.perf_counter(), smaller.made_from[place]
    old, new = job.skeleton, smaller.skeleton
    stored = read_stored(old.block_name(index), job.source.block(index))
    change = BlockChange(name=new.block_name(place), made_from=index, input_sha256=stored.digest)
    tensors = dict(stored.tensors)
    if job.experts is not None:
        change.experts = choose_experts(job, stream, place, index, tensors)
    if change.experts is not None:
        kept, shapes = change.experts.kept, shapes_of(job.full_width.blocks[index])
        names = old_names(old.blocks[index], shapes, kept)
        tensors = {
            name: cut(tensors[before], axis_that_changes(tensors[before].shape, shapes[name]), kept)
            for name, before in names.items()
        }
    if job.width is not None:
        tensors, change.width = narrow(job, job.width, stream, place, index, tensors)
    change.seconds = round(time.perf_counter() - started, 3)
    return tensors, change


def _seconds(change: BlockChange) -> float:
    """Time for a block and its repair."""
    return change.seconds + (change.repair.seconds if change.repair is not None else 0.0)


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


def _record(
    job: StructureJob,
    windows: Windows,
    earlier: StructureRecord | None,
    found: Sequence[BlockStep],
) -> StructureRecord:
    """A new record with the steps that are found, or the record of the run that is resumed.

    Raises:
        FileExistsError: the earlier run had other inputs.
    """
    measuring = job.measuring
    inputs = run_inputs(measuring, windows)
    if earlier is not None:
        earlier.check_same_run(job.recipe, inputs)
        return earlier
    return StructureRecord(
        source=measuring.model_name,
        recipe=job.recipe,
        inputs=inputs,
        versions=versions(),
        hardware=describe_hardware(measuring.device),
        search=list(found),
    )
