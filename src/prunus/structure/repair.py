"""What makes up for parts that went: the blocks that are left learn what the dense model computes.

    smaller stream  x̂ ──► block k, smaller than it was ──► trained towards y
    dense stream    x  ──► old blocks, up to the next one that is left ──► y

So a block in front of a gap learns to do the work of the blocks that went. Trained are this block,
every block that lost parts, and all blocks behind them, whose inputs have changed. The last block
learns the next tokens of the dense model. How long a block is trained is decided as for pruned
blocks (`reconstruction/`), but all its linears are trained, and nothing is masked. In a mixture of
experts the rows of the router that stay are trained too: tokens of the lost experts go to others
now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from prunus.distributed import own_part, split_range
from prunus.model.stream import Stream
from prunus.pruning.reconstruction.reconstruct_block import BlockReconstructor
from prunus.pruning.records import ReconstructionRecord
from prunus.runs.record import Walk
from prunus.structure.layout import shapes_of
from prunus.structure.plan import SmallerModel, StructureJob

__all__ = ["Repair"]


class Repair:
    """Trains the blocks of a smaller model, one after the other. Call `advance` for each in order.

    Args:
        job: the checked run, whose recipe asks for repair.
        smaller: the model that is made.
        stream: the windows of the smaller model.
        batches: token ids of the windows of all ranks.
        walks: per block of the model how the ranks take their batches through it.
        spill_to: folder for a file of hidden states, or None to keep them in memory.
    """

    def __init__(
        self,
        job: StructureJob,
        smaller: SmallerModel,
        stream: Stream,
        batches: Sequence[Tensor],
        walks: Sequence[Walk],
        spill_to: Path | None,
    ) -> None:
        self._job, self._smaller, self._stream, self._walks = job, smaller, stream, walks
        counts = [len(part) for part in split_range(len(batches), job.ranks.size)]
        own = own_part(job.ranks, batches)
        self._dense = Stream(job.skeleton, job.source, stream.device)
        self._dense.embed(own, spill_to, on_device=job.measuring.hidden_states_stay)
        self._depth = 0
        places = range(len(smaller.made_from))
        self._first = next((place for place in places if self._changes(place)), len(places))
        settings = job.measuring.reconstruction
        assert settings is not None
        self._reconstructor = BlockReconstructor(
            settings=settings,
            stream=stream,
            dense=self._dense,
            numbers=range(len(own)),
            counts=counts,
            ranks=job.ranks,
            split=job.step_ranks(batches),
        )

    def advance(self, place: int) -> None:
        """Take the windows through the dense model, to where block `place` should end."""
        end = [*self._smaller.made_from, len(self._job.skeleton)][place + 1]
        for index in range(self._depth, end):
            self._dense.propagate(index, self._job.source.block(index))
        self._depth = end

    def train(
        self, place: int, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], ReconstructionRecord | None]:
        """Train a block of the smaller model; `advance` comes first.

        Args:
            place: position of the block. The smaller stream stands before it, and stays there.
            tensors: its tensors by relative name, as stored.

        Returns:
            The tensors of the trained block, and what training did; the tensors as they are and
            None for a block that is not trained.
        """
        if place < self._first:
            return dict(tensors), None
        skeleton, walk = self._smaller.skeleton, self._walks[self._index(place)]
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

    def close(self) -> None:
        """Release the hidden states of the dense model."""
        self._dense.close()

    def _index(self, place: int) -> int:
        return self._smaller.made_from[place]

    def _changes(self, place: int) -> bool:
        """Whether a block lost parts, or stands behind or in front of blocks that went."""
        every = [-1, *self._smaller.made_from, len(self._job.skeleton)]
        before, index, after = every[place : place + 3]
        return (before, after) != (index - 1, index + 1) or bool(self._smaller_tensors(place))

    def _smaller_tensors(self, place: int) -> set[str]:
        """Relative names of the tensors that have lost rows or columns, and of those that went."""
        before = shapes_of(self._job.skeleton.blocks[self._index(place)])
        after = shapes_of(self._smaller.skeleton.blocks[place])
        return {name for name, shape in before.items() if after.get(name) != shape}

    def _routers(self, place: int) -> list[str]:
        """Relative names of the modules whose weights have a row per expert that stays."""
        block, plan = self._smaller.skeleton.blocks[place], self._job.experts
        if plan is None:
            return []
        smaller = self._smaller_tensors(place)
        return [
            name.removesuffix(".weight")
            for name, parameter in block.named_parameters()
            if name in smaller and name.endswith(".weight") and parameter.dim() == 2
        ]
