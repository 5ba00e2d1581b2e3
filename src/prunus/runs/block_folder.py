"""The folder of a result that has one shard per block, and one for all that lies outside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from prunus.model.checkpoint.reader import Checkpoint
from prunus.model.source import tensors_digest
from prunus.runs.folder import ResultFolder
from prunus.runs.job import RunJob
from prunus.runs.loop import Made
from prunus.runs.record import BlockwiseRecord, shard_name


class BlockFolder(ResultFolder):
    """Writes a result block by block, under the names of the checkpoint.

    All ranks call its methods. Only rank 0 touches the folder, and the others get what they need
    from it.

    Attributes:
        finished: Blocks that an earlier run has written; known after `begin`.
    """

    record: BlockwiseRecord

    def __init__(self, folder: Path, record: BlockwiseRecord, job: RunJob) -> None:
        super().__init__(folder, record, job.checkpoint.checkpoint, job.ranks)
        self.job = job
        self.finished = 0

    def begin(self, overwrite: bool) -> None:
        def prepare() -> int:
            super(BlockFolder, self).begin(overwrite)
            self.prepare()
            return len(self.record.blocks)

        self.finished = self.ranks.on_rank_0(prepare)
        del self.record.blocks[self.finished :]

    def prepare(self) -> None:
        """What rank 0 writes before the first block."""

    def made_from(self, place: int) -> int:
        """The block of the source that block `place` of the result was made from."""
        return place

    def stored(self, place: int, made: Made) -> dict[str, torch.Tensor]:
        """The tensors of a block's shard, by their names in the checkpoint."""
        return self.job.checkpoint.as_stored(self.made_from(place), made.tensors)

    def restored(self, place: int) -> dict[str, torch.Tensor]:
        """The tensors of a finished block, by relative name, from its shard."""
        index = self.made_from(place)
        shard = Checkpoint(self.folder, only=[shard_name(place)])
        found = shard.read(self.job.checkpoint.block_keys(index))
        return self.job.checkpoint.from_stored(index, found)

    def read_block(self, place: int) -> Mapping[str, torch.Tensor]:
        """The tensors of a finished block, by relative name.

        Raises:
            FileExistsError: The block was made from other weights than the source holds now.
        """
        return self.ranks.tensors_from_rank_0(lambda: self._read_block(place))

    def _read_block(self, place: int) -> dict[str, torch.Tensor]:
        known, source = self.record.blocks[place], self.job.checkpoint
        index = self.made_from(place)
        if tensors_digest(source.block(index)) != known.input_sha256:
            raise FileExistsError(
                f"{self.job.skeleton.block_name(index)} of {source.checkpoint.folder} is not what "
                f"{shard_name(place)} in {self.folder} was made from: the checkpoint was changed "
                "since. Put it back as it was, or choose `overwrite` to start again"
            )
        return self.restored(place)

    def write_block(self, place: int, made: Made) -> None:
        """Write a block's shard, then save the record."""
        if self.ranks.rank == 0:
            self.write_shard(shard_name(place), self.stored(place, made))
        self.record.blocks.append(made.record)
        self.save()
