"""The step that makes the blocks of a smaller model, one after the other.

    measure ► choose what is removed ► cut ► repair ► run the windows through the result

The hidden states are those of the smaller model. So every block is measured on what will reach it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from prunus.distributed import own_part
from prunus.model.stream import Stream
from prunus.pruning.reconstruction.reconstruct_block import step_parts, step_ranks
from prunus.runs.loop import Made, StoredBlock, check_same
from prunus.runs.record import Walk
from prunus.structure.experts import choose_experts
from prunus.structure.layout import axis_that_changes, cut, old_names, shapes_of
from prunus.structure.plan import SmallerModel, StructureJob
from prunus.structure.record import BlockChange
from prunus.structure.repair import Repair
from prunus.structure.width import narrow


class ShrinkStep:
    """Makes one block after the other; see `prunus.runs.loop.BlockStep`.

    Args:
        ids: the calibration windows of all ranks (windows, tokens).
        walks: per block of the old model how the ranks run their batches through it.
    """

    def __init__(
        self,
        job: StructureJob,
        smaller: SmallerModel,
        ids: Tensor,
        walks: Sequence[Walk],
        spill_to: Path,
    ) -> None:
        self._job, self._smaller = job, smaller
        self._stream = Stream(smaller.skeleton, job.source, job.device)
        self._repair: Repair | None = None
        self._open = contextlib.ExitStack()
        self._open.callback(self._stream.close)
        # Without repair, a removed block changes no other block. Then only experts and width need
        # windows.
        batches = ids.split(job.batch) if job.measures_blocks else ()
        own, stays = own_part(job.ranks, batches), job.hidden_states_stay
        spilled = spill_to if job.spills else None
        if not job.recipe.repair:
            self._stream.embed(own, spilled, stays)
            return
        split = step_ranks(job.ranks, max(map(len, batches)), job.device)
        self._stream.embed(own, spilled, stays, step_parts(batches, split))
        dense = Stream(job.skeleton, job.source, job.device)
        self._open.callback(dense.close)
        dense.embed(own, spilled, on_device=stays)
        self._repair = Repair(job, smaller, self._stream, dense, walks, len(batches), split)

    def take(self, place: int, tensors: Mapping[str, Tensor]) -> None:
        """Run the windows through a block that an earlier run has finished."""
        if self._repair is not None:
            self._repair.advance(place)
        self._stream.propagate(place, tensors)

    def make(self, place: int, stored: StoredBlock) -> Made:
        """Make a block, and run the windows through it."""
        if self._repair is not None:
            self._repair.advance(place)
        tensors, change = self._cut(place, stored)
        seconds = change.seconds
        if self._repair is not None:
            tensors, change.repair = self._repair.train(place, tensors)
            seconds += change.repair.seconds if change.repair is not None else 0.0
        check_same(self._job.ranks, change.name, tensors)
        self._stream.propagate(place, tensors)
        return Made(tensors, change, f"made from block {change.made_from} in {seconds:.2f} s")

    def close(self) -> None:
        """Release the hidden states."""
        self._open.close()

    def _cut(self, place: int, stored: StoredBlock) -> tuple[dict[str, Tensor], BlockChange]:
        """A block without what is removed from it: its tensors, and what happened to it."""
        job, smaller, stream = self._job, self._smaller, self._stream
        started, index = time.perf_counter(), smaller.made_from[place]
        name = smaller.skeleton.block_name(place)
        change = BlockChange(name=name, made_from=index, input_sha256=stored.digest)
        tensors = dict(stored.tensors)
        if job.experts is not None:
            change.experts = choose_experts(job, stream, place, index, tensors)
        if change.experts is not None:
            kept, shapes = change.experts.kept, shapes_of(job.full_width.blocks[index])
            tensors = {
                new: cut(tensors[old], axis_that_changes(tensors[old].shape, shapes[new]), kept)
                for new, old in old_names(job.skeleton.blocks[index], shapes, kept).items()
            }
        if job.width is not None:
            tensors, change.width = narrow(job, job.width, stream, place, index, tensors)
        change.seconds = round(time.perf_counter() - started, 3)
        return tensors, change
