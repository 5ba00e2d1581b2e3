"""Where a run puts what it has changed: a new checkpoint folder, or the loaded model itself."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from prunus.model.checkpoint.atomic_files import remove
from prunus.model.checkpoint.reader import Checkpoint
from prunus.model.checkpoint.writer import Writable, save_safetensors
from prunus.model.loading import keep_records, manifest_text
from prunus.model.source import ModuleSource
from prunus.pruning.job import Format, PruningJob
from prunus.pruning.manifest import PruningRecord
from prunus.runs.folder import BlockFolder
from prunus.runs.loop import Made

#: Measurements of an unfinished run; they decide the bytes of all blocks.
MEASUREMENT = "sensitivity.safetensors"


class InPlaceOutput:
    """The loaded model itself. Its weights change block by block, and no run can be resumed."""

    def __init__(
        self, source: ModuleSource, record: PruningRecord, stored: Format[PruningRecord]
    ) -> None:
        self.spill_folder = Path(tempfile.gettempdir())
        self.finished = 0
        self._source, self._record, self._format = source, record, stored

    def begin(self, overwrite: bool) -> None:
        """A loaded model is ready."""

    def measured(self, measure: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What `measure` returns."""
        return measure()

    def read_block(self, place: int) -> Mapping[str, torch.Tensor]:
        raise LookupError(f"no earlier run finished block {place} of a loaded model")

    def write_block(self, place: int, made: Made) -> None:
        self._source.write(made.tensors, place)
        self._record.blocks.append(made.record)

    def write_outside(self, changed: Mapping[str, torch.Tensor]) -> None:
        """Write tensors outside the blocks, by their names in the model."""
        self._source.write(changed)

    def complete(self, changed: Mapping[str, torch.Tensor]) -> None:
        """Write tensors outside the blocks, by their names in the model, and keep the records."""
        self.write_outside(changed)
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
    """

    record: PruningRecord
    job: PruningJob

    def __init__(self, folder: Path, record: PruningRecord, job: PruningJob) -> None:
        super().__init__(folder, record, job)
        self.spill_folder = folder

    def prepare(self) -> None:
        # The hashes of what lies outside the blocks were taken just now, and embedding reads it
        # next. Copied now, it is read from the disk only once. A pruned head is not known yet.
        if self.job.format.WRITES_OUTSIDE_FIRST and not self.job.recipe.prunes_head:
            self.write_outside({})

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

        def finish() -> dict[str, object]:
            self.write_outside(changed)
            self.job.format.finish(self, self.record)
            remove(self.folder / MEASUREMENT)
            return self.record.model_dump(mode="json")

        self.record.adopt(self.ranks.on_rank_0(finish))

    def check_finished(self) -> None:
        def check() -> None:
            self.job.format.check_finished(self, self.record)
            remove(self.folder / MEASUREMENT)  # A run that was killed at its very end left it.

        self.ranks.on_rank_0(check)

    def stored(self, place: int, made: Made) -> dict[str, torch.Tensor]:
        tensors = super().stored(place, made)
        for name, weight in made.packed.items():
            key = self.job.stored_key(f"{made.record.name}.{name}")
            del tensors[key]
            tensors |= self.job.format.tensors_of(key, weight, made.record.linears[name])
        return tensors

    def restored(self, place: int) -> dict[str, torch.Tensor]:
        if not self.job.format.QUANTIZES:
            return super().restored(place)
        shard = Checkpoint(self.folder, only=[self.record.shard(place)])
        tensors, block = dict(shard.read(shard.tensors)), self.record.blocks[place]
        for name, linear in block.linears.items():
            key = self.job.stored_key(f"{block.name}.{name}")
            dtype = self.job.checkpoint.checkpoint.tensors[key].dtype
            tensors[key] = self.job.format.weight_from(key, tensors, linear, dtype)
        return self.job.checkpoint.from_stored(place, tensors.items())

    def write_outside(self, changed: Mapping[str, torch.Tensor]) -> None:
        """Write the shard of everything outside the blocks, unless it is there and unchanged."""
        source = self.job.checkpoint
        keys = source.outside_keys()
        if keys and (changed or not self.has(self.record.outside_shard)):
            replaced = {source.stored[name]: tensor for name, tensor in changed.items()}
            # With little memory, cached pages of the written file would push out the pages that
            # were read for it and are needed again at once.
            uncached = 4 * source.checkpoint.nbytes(keys) > self.job.host_budget
            dense: dict[str, Writable] = {**source.checkpoint.stored(keys), **replaced}
            tensors = self.job.format.outside(self, self.record, dense)
            self.write_shard(self.record.outside_shard, tensors, uncached=uncached)
            self.save()


#: What a run writes to. All have a folder for hidden states that do not fit in memory, and know
#: after `begin` how many blocks an earlier run has finished.
PruningOutput = InPlaceOutput | CheckpointFolder
