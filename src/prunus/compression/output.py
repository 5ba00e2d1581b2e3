"""The folder of a compressed checkpoint, whose linears are packed from the first shard on.

No dense copy of them is ever written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load_file

from prunus.compression.card import compressed_card
from prunus.compression.file_size import file_size
from prunus.compression.job import CompressionJob
from prunus.compression.quantize_rows import quantize_rows
from prunus.compression.records import CompressionRecord, FileSize
from prunus.hardware.errors import naming
from prunus.model.checkpoint.atomic_files import read_json, remove
from prunus.model.checkpoint.reader import Checkpoint
from prunus.model.checkpoint.writer import Writable, save_safetensors
from prunus.model.kinds import kind_of
from prunus.packed.description import Description, QuantizedShape
from prunus.packed.forms import checked_weight, expand
from prunus.packed.weight import named_tensors
from prunus.pruning.manifest import LinearRecord
from prunus.pruning.output import PrunedFolder
from prunus.runs.loop import Made

#: Measurements of an unfinished run; they decide the bytes of all blocks.
MEASUREMENT = "sensitivity.safetensors"


class CompressedFolder(PrunedFolder):
    """A `PrunedFolder` whose linears are packed."""

    record: CompressionRecord
    job: CompressionJob

    def measured(self, measure: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Named tensors that `measure` returns now, or has returned in the run that is resumed."""
        path = self.folder / MEASUREMENT
        if path.exists():
            return load_file(path)
        found = measure()
        self.save()
        save_safetensors(path, found)
        return found

    def complete(self, changed: Mapping[str, torch.Tensor]) -> None:
        # All shards are written: the one of what lies outside the blocks was the first.
        self.record.size = FileSize(**self.ranks.on_rank_0(lambda: self._size().model_dump()))
        super().complete(changed)
        self._forget_measurement()

    def check_finished(self) -> None:
        super().check_finished()
        # A run that was killed at its very end left it.
        self._forget_measurement()

    def _forget_measurement(self) -> None:
        if self.ranks.rank == 0:
            remove(self.folder / MEASUREMENT)

    def _size(self) -> FileSize:
        written = Checkpoint(self.folder, only=list(self.record.sha256))
        source, model = self.job.checkpoint, self.job.skeleton.model
        return file_size(source, model, written.tensors, written.file_bytes())

    def stored(self, place: int, made: Made) -> dict[str, torch.Tensor]:
        tensors = super().stored(place, made)
        for name, weight in made.packed.items():
            full_name = f"{made.record.name}.{name}"
            del tensors[self.key(full_name)]
            tensors |= self.tensors_of(full_name, weight)
        return tensors

    def restored(self, place: int) -> dict[str, torch.Tensor]:
        checkpoint = Checkpoint(self.folder, only=[self.record.shard(place)])
        tensors, record = dict(checkpoint.read(checkpoint.tensors)), self.record.blocks[place]
        for name, linear in record.linears.items():
            key = self.key(full_name := f"{record.name}.{name}")
            dtype = self.job.checkpoint.checkpoint.tensors[key].dtype
            tensors[key] = self.weight_from(tensors, full_name, linear, dtype)
        return self.job.checkpoint.from_stored(place, tensors.items())

    def tensors_of(self, name: str, weight: Any) -> dict[str, torch.Tensor]:
        """The tensors that store the weight of a linear, by their names in the file."""
        return named_tensors(self._stored_linear(name), weight)

    def weight_from(
        self, tensors: dict[str, torch.Tensor], name: str, record: LinearRecord, dtype: torch.dtype
    ) -> torch.Tensor:
        """The dense weight of a linear from `tensors_of`; removes these from `tensors`."""
        linear = self._stored_linear(name)
        described = Description.of_linears({linear: record.packed or {}})
        weight, offsets = checked_weight(described, linear, tensors)
        for part in described.tensors(linear):
            del tensors[part]
        return expand(weight, dtype, offsets)

    def outside(self, tensors: dict[str, Writable]) -> dict[str, Writable]:
        source = self.job.checkpoint
        for key, copies in self.job.packed_outside.items():
            linear = key.removesuffix(".weight")
            with naming(key):
                weight = quantize_rows(
                    source.checkpoint.whole(key), self.job.recipe.packs_head or 0
                )
            for name in (key, *copies):
                del tensors[name]
            tensors |= named_tensors(linear, weight)
            self.record.packed_outside[linear] = QuantizedShape.of(weight).to_json()
        # The shard is written next. A run that is killed between the two writes it again.
        self.save()
        return tensors

    def card(self) -> str:
        source = self.job.checkpoint
        loader = kind_of(source.config).loader
        return compressed_card(self.record, loader, source.checkpoint.folder)

    def config(self) -> Mapping[str, object]:
        entries = dict(self.record.packed_outside)
        for block in self.record.blocks:
            for name, linear in block.linears.items():
                if linear.packed is not None:
                    entries[self._stored_linear(f"{block.name}.{name}")] = linear.packed
        source = self.job.checkpoint.checkpoint.folder
        return Description.of_linears(entries).add_to(read_json(source / "config.json"))

    def key(self, linear: str) -> str:
        """The stored name of the weight of a linear."""
        return self.job.checkpoint.stored[f"{linear}.weight"]

    def _stored_linear(self, name: str) -> str:
        return self.key(name).removesuffix(".weight")
