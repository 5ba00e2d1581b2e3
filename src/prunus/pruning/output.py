"""Where a run puts what it has pruned: a new checkpoint folder, or the loaded model itself.

A finished shard is a checkpoint of the run. The index file comes last, and no loader finds the
weights without it: nobody can mistake a half-finished folder for a model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.model.checkpoint.atomic_files import (
    fsync_folder,
    make_folder,
    remove_temporaries,
    write_json,
    write_text,
)
from prunus.model.checkpoint.companions import auxiliary_files, copy_companion
from prunus.model.checkpoint.digests import check_shard
from prunus.model.checkpoint.output_folder import check_apart, check_whole, is_vacant
from prunus.model.checkpoint.reader import INDEX_NAME, Checkpoint
from prunus.model.checkpoint.writer import save_safetensors
from prunus.model.kinds import kind_of
from prunus.model.records import keep_records, manifest_text
from prunus.model.source import CheckpointSource, ModuleSource, tensors_digest
from prunus.pruning.block.block_state import FinishedBlock
from prunus.pruning.manifest import MANIFEST_NAME, Manifest
from prunus.pruning.model_card import model_card

__all__ = [
    "OUTSIDE_SHARD",
    "CheckpointOutput",
    "InPlaceOutput",
    "Output",
    "bytes_in",
    "check_output",
    "prepare_folder",
    "shard_name",
]

#: Shard of everything outside the blocks: embeddings, final norm and head.
OUTSIDE_SHARD = "outer.safetensors"


def shard_name(index: int) -> str:
    """File name of a block's shard.

    >>> shard_name(3)
    'block-00003.safetensors'
    """
    return f"block-{index:05d}.safetensors"


def check_output(output: Path, source: Path, overwrite: bool) -> Manifest | None:
    """Check that a run may write into a folder.

    Args:
        output: The folder of the result.
        source: The folder of the dense checkpoint.
        overwrite: Whether the run replaces an earlier result.

    Returns:
        The manifest of an earlier run in the folder that this run does not replace, or None.

    Raises:
        FileExistsError: Something else is there.
        ValueError: Output and source are the same folder, or one lies in the other.
    """
    check_apart(output, source)
    if is_vacant(output):
        return None
    if not (output / MANIFEST_NAME).exists():
        raise FileExistsError(
            f"output {output} exists and does not come from prunus; it is left as it is. Choose "
            "another folder"
        )
    return None if overwrite else Manifest.load(output)


class ShardRecord(Protocol):
    """A record of a run whose result has one shard per block."""

    blocks: list[Any]
    sha256: dict[str, str]

    def save(self, folder: Path) -> None:
        """Write the record into a folder."""
        ...


def prepare_folder(folder: Path, record: ShardRecord, overwrite: bool) -> None:
    """Create the folder of a result, or clean up what a killed run left half-written.

    Afterwards the record names finished blocks only.

    Raises:
        ValueError: A disk or a copy has changed a shard of the run that is resumed; names it.
    """
    make_folder(folder)
    for name, expected in record.sha256.items():
        if (folder / name).exists():
            remedy = "remove it, and the same command makes it again"
            check_shard(folder / name, expected, remedy)
    # The record claims the folder first. Then the index goes, and the rest of an overwritten
    # result is no model any more.
    record.save(folder)
    (folder / INDEX_NAME).unlink(missing_ok=True)
    fsync_folder(folder)
    if overwrite:
        for path in folder.glob("*.safetensors"):
            path.unlink()
    remove_temporaries(folder)
    for index in range(len(record.blocks)):
        if not (folder / shard_name(index)).exists():
            # A shard was deleted. The blocks after it are made again as well.
            for lost in range(index, len(record.blocks)):
                record.sha256.pop(shard_name(lost), None)
            del record.blocks[index:]
            record.save(folder)
            break


def bytes_in(folder: Path) -> int:
    """Bytes of the files in a folder; 0 if there is no such folder."""
    if not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


class Output(Protocol):
    """What a run writes to.

    Attributes:
        spill_folder: Where hidden states go that do not fit in memory.
        finished_blocks: Blocks that an earlier run has written; known after `begin`.
    """

    spill_folder: Path
    finished_blocks: int

    def begin(self, manifest: Manifest, overwrite: bool) -> None:
        """Get ready for blocks. `manifest` is the run's own; later calls add to it.

        If blocks of an earlier run are lost, their entries are removed from the manifest.
        """
        ...

    def read_block(self, index: int) -> Mapping[str, torch.Tensor]:
        """The pruned tensors of a finished block, by names relative to the block."""
        ...

    def write_block(
        self, index: int, stored: Mapping[str, torch.Tensor], finished: FinishedBlock
    ) -> None:
        """Keep a pruned block, then enter it in the manifest.

        Args:
            index: Position of the block.
            stored: Its dense tensors, by names relative to the block.
            finished: What was made of it.
        """
        ...

    def finish(self, changed: Mapping[str, torch.Tensor]) -> None:
        """Complete the result after the last block; the manifest is closed already.

        Args:
            changed: Pruned tensors outside the blocks, by the model's names: the head, if the
                recipe prunes it.
        """
        ...

    def check_finished(self) -> None:
        """Check that a result of an earlier run, which its manifest calls finished, is whole."""
        ...


class InPlaceOutput:
    """The loaded model itself. Its weights change block by block, and no run can be resumed."""

    def __init__(self, source: ModuleSource) -> None:
        self.spill_folder = Path(tempfile.gettempdir())
        self.finished_blocks = 0
        self._source = source

    def begin(self, manifest: Manifest, overwrite: bool) -> None:
        self._manifest = manifest

    def read_block(self, index: int) -> Mapping[str, torch.Tensor]:
        raise LookupError(f"no earlier run finished block {index} of a loaded model")

    def write_block(
        self, index: int, stored: Mapping[str, torch.Tensor], finished: FinishedBlock
    ) -> None:
        self._source.write(index, finished.changed)
        self._manifest.blocks.append(finished.record)

    def finish(self, changed: Mapping[str, torch.Tensor]) -> None:
        self._source.write_outside(changed)
        model = self._source.model
        name = str(getattr(model, "name_or_path", "") or self._manifest.source)
        named = self._manifest.model_copy(update={"source": name})
        card = model_card(named, kind_of(self._source.config).loader)
        keep_records(
            model,
            {"README.md": card, MANIFEST_NAME: manifest_text(named.model_dump(mode="json"))},
        )

    def check_finished(self) -> None:
        """A loaded model has no earlier run."""


class CheckpointOutput:
    """A folder with a shard per block, the manifest, the index, and copies of config and tokenizer.

    Every method leaves the folder in a state from which a killed run can resume. With several ranks
    only rank 0 touches the folder. The others call the same methods and get what they need from it.
    """

    def __init__(
        self,
        folder: Path,
        source: CheckpointSource,
        ranks: Ranks = SINGLE_PROCESS,
        memory: float = float("inf"),
        trust_remote_code: bool = False,
    ) -> None:
        """An output in `folder`, which need not exist.

        Args:
            folder: The folder of the new checkpoint.
            source: The dense checkpoint.
            ranks: The processes of the run.
            memory: Bytes that the run may take on the host.
            trust_remote_code: Also copy model code that comes with the checkpoint.
        """
        self.folder = folder
        self.spill_folder = folder
        self.finished_blocks = 0
        self._source = source
        self._ranks = ranks
        self._memory = memory
        self._trust_remote_code = trust_remote_code

    def begin(self, manifest: Manifest, overwrite: bool) -> None:
        """Create the folder, or clean up what a killed run left half-written.

        Raises:
            ValueError: A tensor that the run copies is not finite.
        """
        self._manifest = manifest
        with self._ranks.fail_together():
            self._source.check_outside_finite()
        self.finished_blocks = self._ranks.on_rank_0(lambda: self._begin(overwrite))
        del manifest.blocks[self.finished_blocks :]

    def _begin(self, overwrite: bool) -> int:
        """As `begin`; returns how many finished blocks there are."""
        manifest = self._manifest
        prepare_folder(self.folder, manifest, overwrite)
        # The check above has just read what lies outside the blocks, and embedding reads it next.
        # Copied now, it comes from the disk only once. A pruned head is not known yet.
        if not manifest.recipe.head and not self._has_outside():
            self._write_outside({})
            manifest.save(self.folder)
        return len(manifest.blocks)

    def _has_outside(self) -> bool:
        """Whether the shard of what lies outside the blocks is there, and in the manifest."""
        return OUTSIDE_SHARD in self._manifest.sha256 and (self.folder / OUTSIDE_SHARD).exists()

    def read_block(self, index: int) -> Mapping[str, torch.Tensor]:
        """The pruned tensors of a finished block, by names relative to the block.

        Raises:
            FileExistsError: The block was made from other weights than the source holds now.
        """
        return self._ranks.tensors_from_rank_0(lambda: self._read_block(index))

    def _read_block(self, index: int) -> dict[str, torch.Tensor]:
        record = self._manifest.blocks[index]
        if tensors_digest(self._source.block(index)) != record.input_sha256:
            raise FileExistsError(
                f"{record.name} of {self._source.checkpoint.folder} is not what "
                f"{shard_name(index)} in {self.folder} was made from: the checkpoint was changed "
                "since. Put it back as it was, or --overwrite starts again"
            )
        return self._source.from_stored(index, self._read_shard(index).items())

    def _read_shard(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of a block by stored name, as `_shard` got them."""
        checkpoint = Checkpoint(self.folder, only=[shard_name(index)])
        return dict(checkpoint.read(self._source.block_keys(index)))

    def write_block(
        self, index: int, stored: Mapping[str, torch.Tensor], finished: FinishedBlock
    ) -> None:
        """Write the block's shard under the checkpoint's own names, then save the manifest."""
        if self._ranks.rank > 0:
            self._manifest.blocks.append(finished.record)
            return
        tensors = self._shard(index, stored, finished)
        self._source.checkpoint.check_unchanged()
        name = shard_name(index)
        self._manifest.sha256[name] = save_safetensors(self.folder / name, tensors)
        self._manifest.blocks.append(finished.record)
        self._manifest.save(self.folder)

    def _shard(
        self, index: int, stored: Mapping[str, torch.Tensor], finished: FinishedBlock
    ) -> dict[str, torch.Tensor]:
        """The tensors of a block's shard, by their names in the checkpoint."""
        return self._source.as_stored(index, {**stored, **finished.changed})

    def finish(self, changed: Mapping[str, torch.Tensor]) -> None:
        """Write what lies outside the blocks, copy config and tokenizer, write card and index."""
        self._ranks.on_rank_0(lambda: self._finish(changed))

    def _finish(self, changed: Mapping[str, torch.Tensor]) -> None:
        source, checkpoint = self._source, self._source.checkpoint
        if changed or not self._has_outside():
            self._write_outside(changed)
        for path in auxiliary_files(checkpoint.folder, code=self._trust_remote_code):
            copy_companion(path, self.folder / path.name)
        card = model_card(self._manifest, kind_of(source.config).loader, checkpoint.folder)
        write_text(self.folder / "README.md", self._card(card))
        self._write_config()
        names = [shard_name(index) for index in range(len(self._manifest.blocks))]
        if source.outside_keys():
            names.append(OUTSIDE_SHARD)
        shards = Checkpoint(self.folder, only=names)
        index_content = {
            "metadata": {"total_size": shards.nbytes(shards.tensors)},
            "weight_map": {name: info.file for name, info in sorted(shards.tensors.items())},
        }
        write_json(self.folder / INDEX_NAME, index_content)
        self._manifest.save(self.folder)

    def _card(self, card: str) -> str:
        """The model card of the result."""
        return card

    def _write_config(self) -> None:
        """Change the copy of config.json where the result needs it."""

    def _write_outside(self, changed: Mapping[str, torch.Tensor]) -> None:
        """Write the shard of everything outside the blocks; `changed` as for `finish`."""
        keys = self._source.outside_keys()
        if keys:
            replaced = {self._source.stored_name(name): tensor for name, tensor in changed.items()}
            # With little memory, cached pages of the written file would push out the pages that
            # were read for it and are needed again at once.
            uncached = 4 * self._source.checkpoint.nbytes(keys) > self._memory
            tensors = self._outside(dict(self._source.checkpoint.read(keys)) | replaced)
            self._manifest.sha256[OUTSIDE_SHARD] = save_safetensors(
                self.folder / OUTSIDE_SHARD, tensors, uncached=uncached
            )

    def _outside(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of the shard of what lies outside the blocks."""
        return tensors

    def check_finished(self) -> None:
        """Check that the finished result still has all its shards.

        Raises:
            FileExistsError: A file was deleted or cut off.
        """
        self._ranks.on_rank_0(lambda: check_whole(self.folder))
