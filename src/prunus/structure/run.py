"""The story of one run of shrink.

    checkpoint ──► the model without weights ──► a search for blocks
                                                   │
    for each block that stays:  load ► measure ► choose ► cut ► repair ► write

    smaller checkpoint + config.json + prunus-structure.json

A killed run resumes after the blocks that are finished.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.hardware.memory import peak_memory
from prunus.model.checkpoint.reader import Checkpoint
from prunus.model.experts import Fused
from prunus.model.skeleton import names_in_model
from prunus.options import takes
from prunus.runs.folder import BlockFolder, find_earlier, held, resumed_or_new
from prunus.runs.loop import Made, run_blocks
from prunus.runs.options import RunOptions
from prunus.runs.plan import check_room, check_same_on_all_ranks
from prunus.runs.progress import pruning_step, shows_progress
from prunus.runs.record import bos_words, result_card, source_name
from prunus.runs.windows import calibration_windows, given_windows, run_inputs
from prunus.structure.plan import SmallerModel, StructureJob, plan_structure
from prunus.structure.records import StructureRecipe, StructureRecord, what_was_removed
from prunus.structure.search import choose_blocks
from prunus.structure.step import ShrinkStep


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
    model: str | Path, output: Path, recipe: StructureRecipe, options: RunOptions
) -> StructureRecord:
    """Carry out a recipe. The other arguments and errors are those of `shrink`."""
    started = time.perf_counter()
    with options.with_ranks() as joint, contextlib.ExitStack() as stack:
        ranks = joint.processes

        def find() -> StructureRecord | None:
            return find_earlier(StructureRecord, output, recipe, joint, Path(str(model)))

        # All checks. Until the end, no other run can use the output.
        earlier = stack.enter_context(held(StructureRecord, output, ranks, find))
        with ranks.fail_together():
            decided_dtype = earlier.inputs.dtype if earlier is not None else None
            job = plan_structure(model, recipe, joint, decided_dtype)
        ranks.on_rank_0(lambda: check_room(job, output))

        # The calibration windows, and the record that says which run this is.
        job.options.tell(f"drawing calibration windows from {job.recipe.calibration}")
        with ranks.fail_together():
            windows = calibration_windows(job)
            inputs = run_inputs(job, windows)
            own = {"source": job.model_name, "shard_count": job.keep_blocks + 1}
            record = resumed_or_new(StructureRecord, earlier, job.recipe, inputs, job.device, **own)
        walks = check_same_on_all_ranks(job, record)
        folder = SmallerFolder(output, record, job)
        if record.state == "finished":
            folder.check_finished()
            return record

        folder.begin(job.options.overwrite)
        job.measured = record.measured
        with torch.no_grad():
            kept = choose_blocks(job, windows.ids, record.search, folder.save)
            smaller = folder.smaller = job.smaller(kept)
            record.config = _changes(job.raw, smaller.config)
            step = ShrinkStep(job, smaller, windows.ids, walks, output)
            with contextlib.closing(step):
                names = smaller.skeleton.block_name
                run_blocks(job, step, folder, folder.finished, made_from=kept, names=names)
        record.totals = {
            "seconds": round(time.perf_counter() - started, 2),
            "peak_memory_bytes": peak_memory(),
        }
        folder.complete()
        return record


def _changes(
    before: dict[str, Any], after: dict[str, Any], path: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Field of config.json that changed -> its values before and after."""
    found: dict[str, tuple[Any, Any]] = {}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            found |= _changes(old, value, f"{path}{key}.")
        elif old != value:
            found[f"{path}{key}"] = (old, value)
    return found


def renumbered(key: str, old: int, new: int) -> str:
    """The stored name of a tensor of block `old` when it becomes block `new`.

    >>> renumbered("model.layers.7.mlp.experts.7.up.weight", 7, 5)
    'model.layers.5.mlp.experts.7.up.weight'
    """
    return re.sub(rf"(^|\.){old}\.", rf"\g<1>{new}.", key, count=1)


class SmallerFolder(BlockFolder):
    """Writes the smaller model, which is known after the search for blocks."""

    record: StructureRecord
    job: StructureJob
    smaller: SmallerModel  #: the model that is written; must be set before the first block

    def made_from(self, place: int) -> int:
        return self.smaller.made_from[place]

    def stored(self, place: int, made: Made) -> dict[str, Tensor]:
        names, fused = self._names(place)
        found = {key: made.tensors[name] for name, key in names.items()}
        return found | {key: each.join(made.tensors) for key, each in fused.items()}

    def restored(self, place: int) -> dict[str, Tensor]:
        names, fused = self._names(place)
        shard = Checkpoint(self.folder, only=[self.record.shard(place)])
        stored = dict(shard.read(shard.tensors))
        found = {name: stored[key] for name, key in names.items()}
        for key, each in fused.items():
            found |= each.cut(stored[key])
        return found

    def _names(self, place: int) -> tuple[dict[str, str], dict[str, Fused]]:
        """Relative name -> stored name of the tensors of a block, and stored name -> fused one."""
        index, skeleton = self.made_from(place), self.smaller.skeleton
        names, joined = (
            {name: renumbered(key, index, place) for name, key in found.items()}
            for found in self.job.checkpoint.block_names(index)
        )
        fused = {joined[x.name]: x for x in skeleton.fused(place) if x.name in joined}
        inside = {member for each in fused.values() for member in each.members}
        wanted = skeleton.blocks[place].state_dict().keys() - inside
        return {name: key for name, key in names.items() if name in wanted}, fused

    def complete(self) -> None:
        """Write all that is outside the blocks, and complete the result."""
        self.record.totals = self.ranks.on_rank_0(self._complete)
        self.record.state = "finished"

    def _complete(self) -> dict[str, object]:
        source, record, old = self.job.checkpoint, self.record, self.job.skeleton
        unknown = names_in_model(old, source.checkpoint.tensors)[2]
        record.left_out = sorted(k for n, k in unknown.items() if n.startswith(f"{old.path}."))
        keys = sorted(set(source.outside_keys()) - set(record.left_out))
        self.write_shard(record.outside_shard, source.checkpoint.stored(keys))
        shards = [*map(record.shard, range(record.shard_count))]
        written = Checkpoint(self.folder, only=shards)
        record.totals["parameters"] = _parameters(written)
        record.totals["parameters_before"] = _parameters(source.checkpoint)
        self.finish(
            shards,
            card=self._card(written.file_bytes()),
            config=self.smaller.config,
            code=self.job.options.trust_remote_code,
        )
        return record.totals

    def _card(self, nbytes: int) -> str:
        record, totals = self.record, self.record.totals
        return result_card(
            record,
            "made smaller",
            [
                f"An ordinary checkpoint with {totals['parameters']:,} of the "
                f"{totals['parameters_before']:,} parameters of {source_name(record)}. Its "
                "configuration is smaller too, so that it loads like any other model of its "
                "family.",
                "\n".join(f"- {line}." for line in what_was_removed(record)),
                f"Calibration: {record.inputs.calibration}, {bos_words(record.inputs.bos)}.",
            ],
            tags=["pruned"],
            source=self.job.checkpoint.checkpoint.folder,
            nbytes=nbytes,
        )


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(torch.Size(info.shape).numel() for info in checkpoint.tensors.values())
