"""Repair after removal: train the remaining blocks to reproduce the outputs of the dense model.

    smaller stream  x̂ ──► block k, made smaller ──► trained towards y
    dense stream    x  ──► old blocks, up to the next one that stays ──► y

So a block before a gap learns to do the work of the removed blocks. Repair trains this block, every
block that lost parts, and all blocks after them, whose inputs have changed. The last block learns
the next tokens of the dense model. The schedule is that of reconstruction (`reconstruction/`), but
all linears of a block are trained, and nothing is masked. In a mixture of experts the remaining
rows of the router are trained too, because tokens of the lost experts now choose others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from prunus.distributed import Ranks, split_range
from prunus.model.stream import Stream
from prunus.pruning.job import training_dtype
from prunus.pruning.manifest import ReconstructionRecord
from prunus.pruning.reconstruction.reconstruct_block import BlockReconstructor
from prunus.pruning.reconstruction.schedule import ReconstructionSettings
from prunus.runs.record import Walk
from prunus.structure.layout import shapes_of
from prunus.structure.plan import SmallerModel, StructureJob


class Repair:
    """Trains the blocks of a smaller model, one after the other. Call `advance` for each in order.

    Args:
        walks: per block of the dense model how the ranks run their batches through it.
    """

    def __init__(
        self,
        job: StructureJob,
        smaller: SmallerModel,
        stream: Stream,
        dense: Stream,
        walks: Sequence[Walk],
        batches: int,
        split: Ranks,
    ) -> None:
        self._job, self._smaller = job, smaller
        self._stream, self._dense, self._walks = stream, dense, walks
        self._depth = 0
        places = range(len(smaller.made_from))
        self._first = next((place for place in places if self._changes(place)), len(places))
        dtype = training_dtype(job.device, job.dtype)
        self._reconstructor = BlockReconstructor(
            settings=ReconstructionSettings(epochs=None, learning_rate=None, dtype=dtype),
            stream=stream,
            dense=dense,
            numbers=range(len(dense)),
            counts=[len(part) for part in split_range(batches, job.ranks.size)],
            ranks=job.ranks,
            split=split,
        )

    def advance(self, place: int) -> None:
        """Run the windows through the dense model, up to the output that block `place` learns."""
        end = [*self._smaller.made_from, len(self._job.skeleton)][place + 1]
        for index in range(self._depth, end):
            self._dense.propagate(index, self._job.source.block(index))
        self._depth = end

    def train(
        self, place: int, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], ReconstructionRecord | None]:
        """Train a block of the smaller model; call `advance` before.

        Args:
            place: position of the block. The smaller stream is before it, and does not move.

        Returns:
            The tensors of the trained block, and the record of the training; the same tensors and
            None for a block that is not trained.
        """
        if place < self._first:
            return dict(tensors), None
        skeleton, walk = self._smaller.skeleton, self._walks[self._smaller.made_from[place]]
        block = skeleton.fill(place, tensors, self._stream.device)
        linears = [linear.name for linear in skeleton.linears(place)]
        trained = [*linears, *(name for name in self._routers(place) if name not in linears)]
        reconstruction = self._reconstructor.begin(place, block, trained, walk)
        if reconstruction is None:
            return dict(tensors), None
        with reconstruction.recording(self._stream.forward(place, block)) as forward:
            if reconstruction.suffix is not None:
                for batch in range(len(self._stream)):
                    forward(batch)
        changed, record = reconstruction.run(tensors, tensors)
        skeleton.release(place)
        return {**tensors, **changed}, record

    def _changes(self, place: int) -> bool:
        """Whether a block lost parts, or was next to a removed block."""
        every = [-1, *self._smaller.made_from, len(self._job.skeleton)]
        before, index, after = every[place : place + 3]
        return (before, after) != (index - 1, index + 1) or bool(self._smaller_tensors(place))

    def _smaller_tensors(self, place: int) -> set[str]:
        """Relative names of the tensors that have lost rows or columns, or were removed."""
        before = shapes_of(self._job.skeleton.blocks[self._smaller.made_from[place]])
        after = shapes_of(self._smaller.skeleton.blocks[place])
        return {name for name, shape in before.items() if after.get(name) != shape}

    def _routers(self, place: int) -> list[str]:
        """Relative names of the modules whose weights have a row per remaining expert."""
        if self._job.experts is None:
            return []
        smaller = self._smaller_tensors(place)
        return [
            name.removesuffix(".weight")
            for name, parameter in self._smaller.skeleton.blocks[place].named_parameters()
            if name in smaller and name.endswith(".weight") and parameter.dim() == 2
        ]
