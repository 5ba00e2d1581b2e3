"""The folder of a smaller checkpoint: a shard per block, the record, and at last the index.

As in every run of prunus, a finished shard is a checkpoint of the run, and no loader finds the
weights before the index is there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.model.checkpoint.atomic_files import (
    write_json,
    write_text,
)
from prunus.model.checkpoint.companions import auxiliary_files, copy_companion
from prunus.model.checkpoint.output_folder import check_whole
from prunus.model.checkpoint.reader import INDEX_NAME, Checkpoint
from prunus.model.checkpoint.writer import save_safetensors
from prunus.model.names import names_in_model
from prunus.runs.folder import ResultFolder
from prunus.runs.record import OUTSIDE_SHARD, shard_name
from prunus.structure.card import structure_card
from prunus.structure.plan import SmallerModel, StructureJob
from prunus.structure.record import BlockChange, StructureRecord

__all__ = ["StructureOutput", "renumbered"]


def renumbered(key: str, old: int, new: int) -> str:
    """The stored name of a tensor of block `old` when it becomes block `new`.

    >>> renumbered("model.layers.7.mlp.experts.7.up.weight", 7, 5)
    'model.layers.5.mlp.experts.7.up.weight'
    """
    return re.sub(rf"(^|\.){old}\.", rf"\g<1>{new}.", key, count=1)


class StructureOutput:
    """Writes the result of one run, in a folder that the run has locked.

    With several ranks only rank 0 touches the folder. The others call the same methods and get what
    they need from it.

    Args:
        folder: of the result; it need not exist.
        job: the checked run.
    """

    def __init__(self, folder: Path, job: StructureJob) -> None:
        self.folder = folder
        self._job = job
        self._source = job.source
        self._ranks = job.ranks

    def begin(self, record: StructureRecord, overwrite: bool) -> int:
        """Create the folder, or clean up what a killed run left half-written.

        Returns:
            How many blocks an earlier run has finished.

        Raises:
            ValueError: a shard is not what was written, or a tensor that is copied is not finite.
        """
        self._record = record

        def prepare() -> int:
            ResultFolder(self.folder, record).begin(overwrite)  # type: ignore[arg-type]
            return len(record.blocks)

        taken: int = self._ranks.on_rank_0(prepare)
        del record.blocks[taken:]
        return taken

    def save(self) -> None:
        """Write the record. Only rank 0 does."""
        if self._ranks.rank == 0:
            self._record.save(self.folder)

    def read_block(self, smaller: SmallerModel, place: int) -> dict[str, Tensor]:
        """The tensors of a finished block of the smaller model, by relative name."""
        read = self._ranks.tensors_from_rank_0(lambda: self._read_block(smaller, place))
        return dict(read)

    def _read_block(self, smaller: SmallerModel, place: int) -> dict[str, Tensor]:
        names, fused = self._names(smaller, place)
        checkpoint = Checkpoint(self.folder, only=[shard_name(place)])
        stored = dict(checkpoint.read(checkpoint.tensors))
        found = {name: stored[key] for name, key in names.items()}
        for each in smaller.skeleton.fused(place):
            if each.name in fused:
                found |= each.cut(stored[fused[each.name]])
        return found

    def write_block(
        self, smaller: SmallerModel, place: int, tensors: Mapping[str, Tensor], change: BlockChange
    ) -> None:
        """Write a block's shard under the names of the checkpoint, then save the record.

        Args:
            smaller: the model that is written.
            place: position of the block in it.
            tensors: by relative name, in the dtypes of the checkpoint.
            change: what happened to the block.
        """
        if self._ranks.rank > 0:
            self._record.blocks.append(change)
            return
        names, fused = self._names(smaller, place)
        stored = {key: tensors[name] for name, key in names.items()}
        for each in smaller.skeleton.fused(place):
            if each.name in fused:
                stored[fused[each.name]] = each.join(tensors)
        self._source.checkpoint.check_unchanged()
        name = shard_name(place)
        self._record.sha256[name] = save_safetensors(self.folder / name, stored)
        self._record.blocks.append(change)
        self._record.save(self.folder)

    def _names(self, smaller: SmallerModel, place: int) -> tuple[dict[str, str], dict[str, str]]:
        """How a block of the smaller model is stored; see `CheckpointSource.block_names`."""
        index = smaller.made_from[place]
        names, fused = (
            {name: renumbered(key, index, place) for name, key in found.items()}
            for found in self._source.block_names(index)
        )
        inside = {
            member
            for each in smaller.skeleton.fused(place)
            if each.name in fused
            for member in each.members
        }
        wanted = smaller.skeleton.blocks[place].state_dict().keys() - inside
        return {name: key for name, key in names.items() if name in wanted}, fused

    def finish(self, smaller: SmallerModel) -> None:
        """Write what lies outside the blocks, config, tokenizer and card, and at last the index."""
        self._record.totals = self._ranks.on_rank_0(lambda: self._finish(smaller))
        self._record.state = "finished"

    def _finish(self, smaller: SmallerModel) -> dict[str, Any]:
        """As `finish`; returns the totals of the record."""
        source, record, old = self._source, self._record, self._job.skeleton
        unknown = names_in_model(old, source.checkpoint.tensors)[2]
        record.left_out = sorted(k for n, k in unknown.items() if n.startswith(f"{old.path}."))
        keys = sorted(set(source.outside_keys()) - set(record.left_out))
        record.sha256[OUTSIDE_SHARD] = save_safetensors(
            self.folder / OUTSIDE_SHARD, dict(source.checkpoint.views(keys))
        )
        for path in auxiliary_files(
            source.checkpoint.folder, code=self._job.measuring.options.trust_remote_code
        ):
            # Records of earlier work describe the shards of the source.
            if not path.name.startswith("prunus-") and path.name != "config.json":
                copy_companion(path, self.folder / path.name)
        write_json(self.folder / "config.json", smaller.config)
        names = [shard_name(place) for place in range(len(smaller.made_from))] + [OUTSIDE_SHARD]
        shards = Checkpoint(self.folder, only=names)
        record.totals["parameters"] = _parameters(shards)
        record.totals["parameters_before"] = _parameters(source.checkpoint)
        record.state = "finished"
        write_text(self.folder / "README.md", structure_card(record))
        index_content = {
            "metadata": {"total_size": shards.nbytes(shards.tensors)},
            "weight_map": {name: info.file for name, info in sorted(shards.tensors.items())},
        }
        write_json(self.folder / INDEX_NAME, index_content)
        record.save(self.folder)
        return record.totals

    def check_finished(self) -> None:
        """Check that the finished result still has all its shards.

        Raises:
            FileExistsError: a file was deleted or cut off.
        """
        self._ranks.on_rank_0(lambda: check_whole(self.folder))


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(torch.Size(info.shape).numel() for info in checkpoint.tensors.values())
