"""A run's output as a compressed checkpoint, and the choice between the kinds of output.

A compressed checkpoint holds its quantised linears in the packed format from the first shard on. No
dense copy of them is ever written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from prunus.model.checkpoint.atomic_files import read_json, write_json
from prunus.model.checkpoint.reader import Checkpoint
from prunus.model.checkpoint.writer import save_safetensors
from prunus.model.kinds import kind_of
from prunus.model.linears import tied_embedding
from prunus.model.source import CheckpointSource, ModuleSource
from prunus.packed.description import Description, QuantizedShape
from prunus.packed.forms import checked_weight, expand
from prunus.packed.packing import add_packed_card
from prunus.packed.quantize_rows import quantize_rows
from prunus.packed.weight import named_tensors
from prunus.pruning.block.block_state import FinishedBlock
from prunus.pruning.job import PruningJob
from prunus.pruning.output import CheckpointOutput, InPlaceOutput, Output, shard_name

__all__ = ["MEASUREMENT", "CompressedOutput", "embedding_and_head", "make_output"]

#: Measurements of an unfinished run; they decide the bytes of all blocks.
MEASUREMENT = "sensitivity.safetensors"


def make_output(job: PruningJob, folder: Path | None) -> Output:
    """The output of a run.

    Args:
        job: The checked run.
        folder: The folder of the new checkpoint, which the run has locked; None for a loaded model,
            which is pruned in place.
    """
    if isinstance(job.source, ModuleSource):
        return InPlaceOutput(job.source)
    assert folder is not None, "a checkpoint is pruned into a folder"
    if job.recipe.bits is None:
        return CheckpointOutput(
            folder, job.source, job.ranks, job.host_budget, job.options.trust_remote_code
        )
    return CompressedOutput(folder, job)


class CompressedOutput(CheckpointOutput):
    """A folder whose linears are packed; in every other respect it is a `CheckpointOutput`."""

    def __init__(self, folder: Path, job: PruningJob) -> None:
        assert isinstance(job.source, CheckpointSource)
        super().__init__(
            folder, job.source, job.ranks, job.host_budget, job.options.trust_remote_code
        )
        self._head_bits = job.recipe.head_bits
        self._outside_linears = embedding_and_head(job.skeleton.model)

    def read_measurement(self) -> dict[str, torch.Tensor] | None:
        """What `write_measurement` got in this run or the run that it resumes, or None."""
        path = self.folder / MEASUREMENT
        return load_file(path) if path.exists() else None

    def write_measurement(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep named tensors until the run is finished."""
        save_safetensors(self.folder / MEASUREMENT, tensors)

    def finish(self, changed: Mapping[str, torch.Tensor]) -> None:
        super().finish(changed)
        if self._ranks.rank == 0:
            (self.folder / MEASUREMENT).unlink(missing_ok=True)

    def check_finished(self) -> None:
        super().check_finished()
        if self._ranks.rank == 0:
            # A run that was killed at its very end left it.
            (self.folder / MEASUREMENT).unlink(missing_ok=True)

    def _shard(
        self, index: int, stored: Mapping[str, torch.Tensor], finished: FinishedBlock
    ) -> dict[str, torch.Tensor]:
        tensors = super()._shard(index, stored, finished)
        for name, weight in finished.packed.items():
            linear = self._stored_linear(f"{finished.record.name}.{name}")
            del tensors[f"{linear}.weight"]
            tensors |= named_tensors(linear, weight)
        return tensors

    def _read_shard(self, index: int) -> dict[str, torch.Tensor]:
        checkpoint = Checkpoint(self.folder, only=[shard_name(index)])
        tensors = dict(checkpoint.read(checkpoint.tensors))
        described = Description.of_linears(self._entries([index]))
        for linear in described.linears:
            weight, offsets = checked_weight(described, linear, tensors)
            for name in described.tensors(linear):
                del tensors[name]
            dtype = self._source.checkpoint.tensors[f"{linear}.weight"].dtype
            tensors[f"{linear}.weight"] = expand(weight, dtype, offsets)
        return tensors

    def _outside(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self._head_bits is None:
            return tensors
        for name in self._outside_linears:
            linear = self._stored_linear(name)
            weight = quantize_rows(tensors.pop(f"{linear}.weight"), self._head_bits)
            tensors |= named_tensors(linear, weight)
            self._manifest.packed_outside[linear] = QuantizedShape.of(weight).to_json()
        # The shard is written next. A run that is killed between the two writes it again.
        self._manifest.save(self.folder)
        return tensors

    def _card(self, card: str) -> str:
        return add_packed_card(card, kind_of(self._source.config).loader)

    def _write_config(self) -> None:
        path = self.folder / "config.json"
        blocks = range(len(self._manifest.blocks))
        entries = {**self._manifest.packed_outside, **self._entries(blocks)}
        write_json(path, Description.of_linears(entries).add_to(read_json(path)))

    def _entries(self, blocks: Iterable[int]) -> dict[str, dict[str, Any]]:
        """The entries in config.json of the linears of some blocks, by their stored names."""
        found = {}
        for index in blocks:
            record = self._manifest.blocks[index]
            for name, linear in record.linears.items():
                if linear.packed is not None:
                    found[self._stored_linear(f"{record.name}.{name}")] = linear.packed
        return found

    def _stored_linear(self, name: str) -> str:
        """The name of a linear in the checkpoint, from its name in the model."""
        return self._source.stored_name(f"{name}.weight").removesuffix(".weight")


def embedding_and_head(model: Any) -> list[str]:
    """The names of the embedding and the output head that the packed format can hold.

    Where both are one weight, it has the name of the embedding.
    """
    tied = tied_embedding(model)
    if tied is not None:
        return [tied.name]
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return [
        name
        for name, module in model.named_modules()
        if any(module is each for each in modules) and type(module) in (nn.Embedding, nn.Linear)
    ]
