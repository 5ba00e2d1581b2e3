"""The folder of a smaller checkpoint: blocks get new numbers, and the configuration is smaller."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from prunus.model.checkpoint.reader import Checkpoint
from prunus.model.skeleton import names_in_model
from prunus.runs.folder import BlockFolder
from prunus.runs.loop import Made
from prunus.runs.record import OUTSIDE_SHARD, shard_name
from prunus.structure.card import structure_card
from prunus.structure.plan import SmallerModel, StructureJob
from prunus.structure.record import StructureRecord


def renumbered(key: str, old: int, new: int) -> str:
    """The stored name of a tensor of block `old` when it becomes block `new`.

    >>> renumbered("model.layers.7.mlp.experts.7.up.weight", 7, 5)
    'model.layers.5.mlp.experts.7.up.weight'
    """
    return re.sub(rf"(^|\.){old}\.", rf"\g<1>{new}.", key, count=1)


class SmallerFolder(BlockFolder):
    """Writes the smaller model, which is known after the search for blocks.

    Attributes:
        smaller: the model that is written; must be set before the first block.
    """

    record: StructureRecord
    job: StructureJob
    smaller: SmallerModel

    def made_from(self, place: int) -> int:
        return self.smaller.made_from[place]

    def stored(self, place: int, made: Made) -> dict[str, Tensor]:
        names, fused = self._names(place)
        found = {key: made.tensors[name] for name, key in names.items()}
        for each in self.smaller.skeleton.fused(place):
            if each.name in fused:
                found[fused[each.name]] = each.join(made.tensors)
        return found

    def restored(self, place: int) -> dict[str, Tensor]:
        names, fused = self._names(place)
        shard = Checkpoint(self.folder, only=[shard_name(place)])
        stored = dict(shard.read(shard.tensors))
        found = {name: stored[key] for name, key in names.items()}
        for each in self.smaller.skeleton.fused(place):
            if each.name in fused:
                found |= each.cut(stored[fused[each.name]])
        return found

    def _names(self, place: int) -> tuple[dict[str, str], dict[str, str]]:
        """How a block of the smaller model is stored; see `CheckpointSource.block_names`."""
        index, skeleton = self.made_from(place), self.smaller.skeleton
        names, fused = (
            {name: renumbered(key, index, place) for name, key in found.items()}
            for found in self.job.checkpoint.block_names(index)
        )
        inside = {
            member
            for each in skeleton.fused(place)
            if each.name in fused
            for member in each.members
        }
        wanted = skeleton.blocks[place].state_dict().keys() - inside
        return {name: key for name, key in names.items() if name in wanted}, fused

    def complete(self) -> None:
        """Write all that is outside the blocks, and complete the result."""
        self.record.totals = self.ranks.on_rank_0(self._complete)
        self.record.state = "finished"

    def _complete(self) -> dict[str, object]:
        """As `complete`; returns the totals of the record."""
        source, record, old = self.job.checkpoint, self.record, self.job.skeleton
        unknown = names_in_model(old, source.checkpoint.tensors)[2]
        record.left_out = sorted(k for n, k in unknown.items() if n.startswith(f"{old.path}."))
        keys = sorted(set(source.outside_keys()) - set(record.left_out))
        self.write_shard(OUTSIDE_SHARD, dict(source.checkpoint.views(keys)))
        shards = [*map(shard_name, range(len(self.smaller.made_from))), OUTSIDE_SHARD]
        record.totals["parameters"] = _parameters(Checkpoint(self.folder, only=shards))
        record.totals["parameters_before"] = _parameters(source.checkpoint)
        self.finish(
            shards,
            card=structure_card(record, source.checkpoint.folder),
            config=self.smaller.config,
            code=self.job.options.trust_remote_code,
        )
        return record.totals


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(torch.Size(info.shape).numel() for info in checkpoint.tensors.values())
