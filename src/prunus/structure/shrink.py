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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.distributed import on_rank_0
from prunus.engine.command import Command, Run, run_verb
from prunus.engine.folder import BlockFolder
from prunus.engine.loop import FinishedBlock, run_blocks
from prunus.engine.run_facts import agreed_walks
from prunus.engine.run_options import RunOptions
from prunus.engine.run_record import bos_words, result_card, source_name
from prunus.engine.session import SILENT, Session, shown_session
from prunus.model.checkpoint.tensor_files import Checkpoint
from prunus.model.experts import Fused
from prunus.model.skeleton import names_in_model
from prunus.options import takes
from prunus.structure.search import choose_blocks
from prunus.structure.step import ShrinkStep
from prunus.structure.structure_plan import SmallerModel, StructurePlan, plan_structure
from prunus.structure.structure_record import StructureRecipe, StructureRecord, what_was_removed


@takes(StructureRecipe, RunOptions, without=("measure_error",))
def shrink(
    model: str | Path,
    output: str | Path,
    *,
    calibration: str | Path | torch.Tensor | Sequence[Any] | None = None,
    recipe: StructureRecipe | str | Path | None = None,
    progress: Callable[..., None] | bool | None = True,
    announce: Callable[[Any], None] | None = None,
    **options: Any,
) -> StructureRecord:
    """Make a model smaller by removing whole parts. The result is an ordinary checkpoint.

    Args:
        model: A checkpoint folder or a hub id.
        output: Folder of the smaller checkpoint.
        calibration: A source of windows, token ids or texts, as for `prunus.prune`.
        recipe: A `StructureRecipe`, or a TOML file with any of its options.
        progress: True shows a bar on a terminal or in a notebook, and nothing elsewhere. A function
            is called after every block with a `prunus.engine.progress.Progress`.
        announce: Called with what is being prepared before the first block.
        **options: Options of `StructureRecipe` and of the run.

    Returns:
        The record of the run, which is also the file `prunus-structure.json` in `output`.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, OSError: As `prune`.
    """
    command = Shrinking.of(model, output, recipe, options, calibration)
    with shown_session("shrink", progress, announce) as session:
        return run_verb(command, session)


class Shrinking(Command[StructurePlan, StructureRecord]):
    """The command shrink, as the engine knows it."""

    RECIPE, KIND = StructureRecipe, StructureRecord

    def plan(self, session: Session = SILENT, decided_dtype: str | None = None) -> StructurePlan:
        """See `plan_structure`."""
        return plan_structure(self.model, self.recipe, self.options, session, decided_dtype)

    def fields(self, plan: StructurePlan) -> dict[str, Any]:
        """The number of shards: one for each block that stays, and one for all else."""
        return {"shard_count": plan.keep_blocks + 1}

    def change_model(self, run: Run[StructurePlan, StructureRecord], prepared: Any) -> None:
        """Search for blocks, make those that stay, and complete the result."""
        plan, session, record = run.plan, run.session, run.record
        assert self.output is not None and run.folder is not None, "a model on disk is made smaller"
        output, walks = self.output, agreed_walks(plan.walks)
        with torch.no_grad():
            blocks_left = choose_blocks(plan, session, run.windows, record, run.folder.save)
            smaller = plan.smaller(blocks_left)
            folder = SmallerFolder(output, record, plan, smaller)
            record.config = _changes(plan.raw, smaller.config)
            step = ShrinkStep(plan, smaller, run.windows, walks, output)
            with contextlib.closing(step):
                names = smaller.skeleton.block_name
                run_blocks(
                    plan, session, step, folder, record.measured, made_from=blocks_left, names=names
                )
        record.totals = run.totals()
        session.tell(f"writing what lies outside the blocks, and completing {output}")
        folder.complete()


def _changes(
    before: dict[str, Any], after: dict[str, Any], path: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Field of config.json that changed -> its values before and after.

    >>> _changes({"text": {"layers": 3}}, {"text": {"layers": 2}})
    {'text.layers': (3, 2)}
    """
    changes: dict[str, tuple[Any, Any]] = {}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            changes |= _changes(old, value, f"{path}{key}.")
        elif old != value:
            changes[f"{path}{key}"] = (old, value)
    return changes


def renumbered(key: str, old: int, new: int) -> str:
    """The stored name of a tensor of block `old` when it becomes block `new`.

    The first number `old` in the name is that of the block; a later one may be that of an expert.

    >>> renumbered("model.layers.7.mlp.experts.7.up.weight", 7, 5)
    'model.layers.5.mlp.experts.7.up.weight'
    """
    return re.sub(rf"(^|\.){old}\.", rf"\g<1>{new}.", key, count=1)


class SmallerFolder(BlockFolder):
    """Writes the smaller model, the last of the arguments; the others are those of `BlockFolder`.

    Tensors have the stored names that the source gives them, with the new positions of their
    blocks. Some checkpoints store the experts of a layer as one tensor: such a tensor is fused
    (`model/experts.py`), and is joined from its members here.
    """

    record: StructureRecord
    plan: StructurePlan

    def __init__(
        self,
        folder: Path,
        record: StructureRecord,
        plan: StructurePlan,
        smaller: SmallerModel,
    ) -> None:
        super().__init__(folder, record, plan, smaller.made_from)
        self.smaller = smaller

    @property
    def finished_seconds(self) -> float:
        """Seconds that the finished blocks took, with their training."""
        repairs = (block.repair for block in self.record.blocks)
        return super().finished_seconds + sum(repair.seconds for repair in repairs if repair)

    def shard_tensors(self, new_index: int, block: FinishedBlock) -> dict[str, Tensor]:
        """Stored name -> tensor of a block that has just been made."""
        names, fused = self._names(new_index)
        tensors = {key: block.tensors[name] for name, key in names.items()}
        return tensors | {key: whole.join(block.tensors) for key, whole in fused.items()}

    def restored(self, new_index: int) -> dict[str, Tensor]:
        """Relative name -> tensor of a finished block, read from its shard."""
        names, fused = self._names(new_index)
        shard = Checkpoint(self.folder, only=[self.record.shard(new_index)])
        stored = dict(shard.read(shard.tensors))
        tensors = {name: stored[key] for name, key in names.items()}
        for key, whole in fused.items():
            tensors |= whole.cut(stored[key])
        return tensors

    def _names(self, new_index: int) -> tuple[dict[str, str], dict[str, Fused]]:
        """Relative name -> stored name of the tensors of a block, and stored name -> fused one."""
        skeleton = self.smaller.skeleton
        old_index = self.made_from[new_index]
        names, joined = (
            {name: renumbered(key, old_index, new_index) for name, key in old_keys.items()}
            for old_keys in self.plan.checkpoint.block_names(old_index)
        )
        fused = {joined[x.name]: x for x in skeleton.fused(new_index) if x.name in joined}
        members = {member for whole in fused.values() for member in whole.members}
        separate = skeleton.blocks[new_index].state_dict().keys() - members
        return {name: key for name, key in names.items() if name in separate}, fused

    def complete(self) -> None:
        """Write all that is outside the blocks, and complete the result. All processes call it."""
        self.record.totals = on_rank_0(self._complete)
        self.record.state = "finished"

    def _complete(self) -> dict[str, object]:
        source = self.plan.checkpoint
        record = self.record
        old = self.plan.skeleton
        # Tensors below the path of the blocks that no block reads, such as those of blocks for
        # further tokens, do not fit the smaller model. All other unknown ones are copied.
        unknown = names_in_model(old, source.checkpoint.tensors)[2]
        record.left_out = sorted(k for n, k in unknown.items() if n.startswith(f"{old.path}."))
        keys = sorted(set(source.outside_keys()) - set(record.left_out))
        self.write_shard(record.outside_shard, source.checkpoint.file_tensors(keys))
        shards = [*map(record.shard, range(record.shard_count))]
        written = Checkpoint(self.folder, only=shards)
        record.totals["parameters"] = _parameters(written)
        record.totals["parameters_before"] = _parameters(source.checkpoint)
        self.finish(
            shards,
            card=result_card(
                record,
                "made smaller",
                [
                    f"An ordinary checkpoint with {record.totals['parameters']:,} of the "
                    f"{record.totals['parameters_before']:,} parameters of {source_name(record)}. "
                    "Its configuration is smaller too, so that it loads like any other model of "
                    "its family.",
                    "\n".join(f"- {line}." for line in what_was_removed(record)),
                    f"Calibration: {record.inputs.calibration}, {bos_words(record.inputs.bos)}.",
                ],
                tags=["pruned"],
                source=source.checkpoint.folder,
                nbytes=written.file_bytes(),
            ),
            config=self.smaller.config,
            code=self.plan.options.trust_remote_code,
        )
        return record.totals


def _parameters(checkpoint: Checkpoint) -> int:
    """Numbers in all tensors of a checkpoint."""
    return sum(torch.Size(info.shape).numel() for info in checkpoint.tensors.values())
