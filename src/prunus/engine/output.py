"""Where a run puts what it has changed: a new checkpoint folder, or the loaded model itself."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from prunus.engine.folder import BlockFolder
from prunus.engine.linear_job import Format, PruningJob
from prunus.engine.linear_record import PruningRecord
from prunus.engine.loop import FinishedBlock
from prunus.model.checkpoint.atomic_files import remove
from prunus.model.checkpoint.reader import Checkpoint
from prunus.model.checkpoint.writer import Writable, save_safetensors
from prunus.model.loading import keep_records, manifest_text
from prunus.model.source import ModuleSource

#: File with the measurements of an unfinished run. They decide the bytes of all blocks, so a
#: resumed run reads them instead of measuring again.
MEASUREMENT = "sensitivity.safetensors"


class InPlaceOutput:
    """The loaded model itself. Its weights change block by block, and no run can be resumed.

    Attributes:
        folder: Folder for hidden states that do not fit in memory.
        finished: 0, because no earlier run has finished a block.
    """

    def __init__(
        self, source: ModuleSource, record: PruningRecord, stored: Format[PruningRecord]
    ) -> None:
        self.folder = Path(tempfile.gettempdir())
        self.finished = 0
        self._source, self._record, self._format = source, record, stored

    def begin(self, overwrite: bool) -> None:
        """A loaded model is ready."""

    def measured(self, measure: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What `measure` returns."""
        return measure()

    def read_block(self, position: int) -> Mapping[str, torch.Tensor]:
        """No block is finished: LookupError."""
        raise LookupError(f"no earlier run finished block {position} of a loaded model")

    def write_block(self, position: int, block: FinishedBlock) -> None:
        """Put the tensors of a block into the model, then enter the block in the record."""
        self._source.write(block.tensors, position)
        self._record.blocks.append(block.record)

    def complete(self, changed: Mapping[str, torch.Tensor]) -> None:
        """Write tensors outside the blocks, by their names in the model, and keep the records."""
        self._source.write(changed)
        self._record.state = "finished"
        model = self._source.model
        name = str(getattr(model, "name_or_path", "") or self._record.source)
        named = self._record.model_copy(update={"source": name})
        text = manifest_text(named.model_dump(mode="json"))
        keep_records(model, {"README.md": self._format.card(named), named.FILE: text})

    def check_finished(self) -> None:
        """A loaded model has no earlier run."""


class CheckpointFolder(BlockFolder):
    """A new folder, whose linears are stored as the format of the run says.

    No dense copy of a quantised linear is ever written.

    Attributes:
        record: The record of the run.
        job: The run, whose `format` stores the linears.
    """

    record: PruningRecord
    job: PruningJob

    def begin(self, overwrite: bool) -> None:
        """Prepare the folder, and write what lies outside the blocks if it is known already."""
        super().begin(overwrite)
        # The hashes of what lies outside the blocks were taken just now, and embedding reads it
        # next. Copied now, it is read from the disk only once. A pruned head is not known yet.
        if self.job.format.WRITES_OUTSIDE_FIRST and not self.job.recipe.plan.head:
            self.ranks.on_rank_0(lambda: self.write_outside({}))

    def measured(self, measure: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Named tensors that `measure` returns now, or has returned in the run that is resumed."""
        path = self.folder / MEASUREMENT
        if path.exists():
            return load_file(path)
        tensors = measure()
        self.save()
        save_safetensors(path, tensors)
        return tensors

    def complete(self, changed: Mapping[str, torch.Tensor]) -> None:
        """Complete the result; `changed` has tensors outside the blocks by their names."""

        def finish() -> None:
            self.write_outside(changed)
            self.job.format.finish(self, self.record)
            remove(self.folder / MEASUREMENT)

        self.ranks.on_rank_0(finish)

    def check_finished(self) -> None:
        """Check that the finished result of an earlier run is whole, as its format says."""

        def check() -> None:
            self.job.format.check_finished(self, self.record)
            remove(self.folder / MEASUREMENT)  # A run that was killed at its very end left it.

        self.ranks.on_rank_0(check)

    def stored(self, position: int, block: FinishedBlock) -> dict[str, torch.Tensor]:
        """The tensors of a block's shard, with quantised linears as the format stores them."""
        rounded = {f"{name}.weight" for name in block.rounded}
        tensors = self.job.checkpoint.as_stored(position, block.tensors, rounded)
        for name, weight in block.rounded.items():
            key = self.job.stored_key(f"{block.record.name}.{name}")
            tensors |= self.job.format.tensors_of(key, weight)
        return tensors

    def restored(self, position: int) -> dict[str, torch.Tensor]:
        """The tensors of a finished block by relative name, with quantised linears dense again."""
        shard = Checkpoint(self.folder, only=[self.record.shard(position)])
        tensors, block = dict(shard.read(shard.tensors)), self.record.blocks[position]
        for name in block.linears if self.job.format.rounding != "none" else ():
            key = self.job.stored_key(f"{block.name}.{name}")
            dtype = self.job.stored_dtype(f"{block.name}.{name}")
            tensors[key] = self.job.format.weight_from(key, tensors, dtype)
        return self.job.checkpoint.from_stored(position, tensors.items())

    def write_outside(self, changed: Mapping[str, torch.Tensor]) -> None:
        """Write the shard of everything outside the blocks, unless it is there and unchanged.

        Args:
            changed: Tensors that replace those of the source, by their names in the model.
        """
        source = self.job.checkpoint
        keys = source.outside_keys()
        if keys and (changed or not self.has(self.record.outside_shard)):
            replaced = {source.stored[name]: tensor for name, tensor in changed.items()}
            # With little memory, cached pages of the written file would push out the pages that
            # were read for it and are needed again at once.
            uncached = 4 * source.checkpoint.nbytes(keys) > self.job.memory.host_budget
            dense: dict[str, Writable] = {**source.checkpoint.stored(keys), **replaced}
            tensors = self.job.format.outside(dense)
            self.write_shard(self.record.outside_shard, tensors, uncached=uncached)
            self.save()


#: What a run writes to. All have a folder for hidden states that do not fit in memory, and know
#: after `begin` how many blocks an earlier run has finished.
PruningOutput = InPlaceOutput | CheckpointFolder
