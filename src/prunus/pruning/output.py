"""Where a run puts what it has pruned: a new checkpoint folder, or the loaded model itself."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from prunus.model.checkpoint.writer import Writable
from prunus.model.kinds import kind_of
from prunus.model.loading import keep_records, manifest_text
from prunus.model.source import ModuleSource
from prunus.pruning.job import PruningJob
from prunus.pruning.manifest import Manifest, PruningRecord, pruned_card
from prunus.runs.folder import BlockFolder
from prunus.runs.loop import Made
from prunus.runs.record import OUTSIDE_SHARD, shard_name


class InPlaceOutput:
    """The loaded model itself. Its weights change block by block, and no run can be resumed."""

    def __init__(self, source: ModuleSource, record: Manifest) -> None:
        self.spill_folder = Path(tempfile.gettempdir())
        self.finished = 0
        self._source, self._record = source, record

    def begin(self, overwrite: bool) -> None:
        """A loaded model is ready."""

    def read_block(self, place: int) -> Mapping[str, torch.Tensor]:
        raise LookupError(f"no earlier run finished block {place} of a loaded model")

    def write_block(self, place: int, made: Made) -> None:
        self._source.write(made.tensors, place)
        self._record.blocks.append(made.record)

    def complete(self, changed: Mapping[str, torch.Tensor]) -> None:
        self._source.write(changed)
        self._record.state = "finished"
        model = self._source.model
        name = str(getattr(model, "name_or_path", "") or self._record.source)
        named = self._record.model_copy(update={"source": name})
        card = pruned_card(named, kind_of(self._source.config).loader)
        text = manifest_text(named.model_dump(mode="json"))
        keep_records(model, {"README.md": card, Manifest.FILE: text})

    def check_finished(self) -> None:
        """A loaded model has no earlier run."""


class PrunedFolder(BlockFolder):
    """A new checkpoint folder, with the configuration and the tokenizer of the source."""

    record: PruningRecord
    job: PruningJob

    def __init__(self, folder: Path, record: PruningRecord, job: PruningJob) -> None:
        super().__init__(folder, record, job)
        self.spill_folder = folder

    def prepare(self) -> None:
        # The hashes of what lies outside the blocks were taken just now, and embedding reads it
        # next. Copied now, it is read from the disk only once. A pruned head is not known yet.
        if not self.job.prunes_head and not self.has(OUTSIDE_SHARD):
            self._write_outside({})
            self.save()

    def complete(self, changed: Mapping[str, torch.Tensor]) -> None:
        self.ranks.on_rank_0(lambda: self._complete(changed))
        self.record.state = "finished"

    def _complete(self, changed: Mapping[str, torch.Tensor]) -> None:
        if changed or not self.has(OUTSIDE_SHARD):
            self._write_outside(changed)
        shards = [shard_name(index) for index in range(len(self.record.blocks))]
        if self.job.checkpoint.outside_keys():
            shards.append(OUTSIDE_SHARD)
        self.finish(
            shards, card=self.card(), config=self.config(), code=self.job.options.trust_remote_code
        )

    def card(self) -> str:
        assert isinstance(self.record, Manifest)
        source, nbytes = self.job.checkpoint, self.job.file_bytes()
        loader = kind_of(source.config).loader
        return pruned_card(self.record, loader, source.checkpoint.folder, nbytes)

    def config(self) -> Mapping[str, object] | None:
        """The content of config.json, where it differs from the source's."""
        return None

    def outside(self, tensors: dict[str, Writable]) -> dict[str, Writable]:
        """The tensors of the shard of what lies outside the blocks."""
        return tensors

    def _write_outside(self, changed: Mapping[str, torch.Tensor]) -> None:
        """Write the shard of everything outside the blocks; `changed` as for `complete`."""
        source = self.job.checkpoint
        keys = source.outside_keys()
        if keys:
            replaced = {source.stored[name]: tensor for name, tensor in changed.items()}
            # With little memory, cached pages of the written file would push out the pages that
            # were read for it and are needed again at once.
            uncached = 4 * source.checkpoint.nbytes(keys) > self.job.host_budget
            tensors = self.outside({**source.checkpoint.stored(keys), **replaced})
            self.write_shard(OUTSIDE_SHARD, tensors, uncached=uncached)


#: What a run writes to. All have a folder for hidden states that do not fit in memory, and know
#: after `begin` how many blocks an earlier run has finished.
PruningOutput = InPlaceOutput | PrunedFolder
