"""The folder of a recovered checkpoint: shards, and the files that the pruned checkpoint lends it.

The index comes last: without it no loader finds the weights, so a folder with half of the shards
does not look like a checkpoint. Every pruned linear is checked, weight by weight, before its shard
is written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from prunus.compression.record import CompressionRecord
from prunus.model.checkpoint.atomic_files import write_json, write_text
from prunus.model.checkpoint.companions import auxiliary_files, copy_companion
from prunus.model.checkpoint.reader import INDEX_NAME
from prunus.model.checkpoint.writer import save_safetensors
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.pruning.manifest import Manifest
from prunus.pruning.output import OUTSIDE_SHARD, shard_name
from prunus.recovery.masks import check_zeros
from prunus.recovery.record import LinearMask
from prunus.structure.record import StructureRecord

__all__ = ["ResultFolder", "files_to_copy"]


class ResultFolder:
    """Writes a recovered checkpoint.

    Args:
        folder: where it goes.
        source: the pruned checkpoint, bound to `skeleton`.
        skeleton: of the model.

    Attributes:
        sha256: file name of a written shard -> SHA-256 of its bytes.
    """

    def __init__(self, folder: Path, source: CheckpointSource, skeleton: Skeleton) -> None:
        self.folder = folder
        self.sha256: dict[str, str] = {}
        self._source = source
        self._skeleton = skeleton

    def write_shards(
        self, changed: Mapping[str, torch.Tensor], pruned: Collection[str]
    ) -> dict[str, LinearMask]:
        """Write one shard per block and one for everything outside the blocks.

        Args:
            changed: full parameter name -> new tensor, in the model's orientation. It is stored in
                the dtype of the pruned checkpoint. All other tensors are copied from there.
            pruned: full names of the pruned linears.

        Returns:
            Full name of each pruned linear -> its zeros before and after.

        Raises:
            RuntimeError: a pruned weight is not zero; its shard is not written.
        """
        found: dict[str, LinearMask] = {}
        for index in range(len(self._skeleton)):
            prefix = f"{self._skeleton.block_name(index)}."
            in_block = {
                name.removeprefix(prefix): tensor
                for name, tensor in changed.items()
                if name.startswith(prefix)
            }
            names = [name.removeprefix(prefix) for name in pruned if name.startswith(prefix)]
            linears = self._write_block(index, in_block, names)
            found |= {f"{prefix}{name}": linear for name, linear in linears.items()}
        outside = [name for name in pruned if name not in found]
        return found | self._write_outside(changed, outside)

    def finish(self, card: str) -> None:
        """Copy configuration and tokenizer, then write the card and, last, the index."""
        for path in files_to_copy(self._source.checkpoint.folder):
            copy_companion(path, self.folder / path.name)
        write_text(self.folder / "README.md", card)
        checkpoint = self._source.checkpoint
        weight_map = dict.fromkeys(self._source.outside_keys(), OUTSIDE_SHARD)
        for index in range(len(self._skeleton)):
            weight_map |= dict.fromkeys(self._source.block_keys(index), shard_name(index))
        total = checkpoint.nbytes(checkpoint.tensors)
        content = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_json(self.folder / INDEX_NAME, content)

    def _write_block(
        self, index: int, changed: Mapping[str, torch.Tensor], pruned: Collection[str]
    ) -> dict[str, LinearMask]:
        """Write the shard of a block; all names are relative to it."""
        stored = self._source.block(index)
        written = {
            name: _in_stored_form(changed.get(name, tensor), tensor)
            for name, tensor in stored.items()
        }
        prefix = self._skeleton.block_name(index)
        shapes = {linear.name: linear.shape for linear in self._skeleton.linears(index)}
        linears = {
            name: check_zeros(
                f"{prefix}.{name}",
                shapes[name],
                stored[f"{name}.weight"],
                written[f"{name}.weight"],
            )
            for name in pruned
        }
        # The shard mixes trained tensors with those of the checkpoint, which must not have changed.
        self._source.checkpoint.check_unchanged()
        self.sha256[shard_name(index)] = save_safetensors(
            self.folder / shard_name(index), self._source.as_stored(index, written)
        )
        return linears

    def _write_outside(
        self, changed: Mapping[str, torch.Tensor], pruned: Collection[str]
    ) -> dict[str, LinearMask]:
        """Write the shard of everything outside the blocks; all names are full names."""
        stored = dict(self._source.checkpoint.views(self._source.outside_keys()))
        keys = self._source.stored_names()
        new = {keys[name]: tensor for name, tensor in changed.items() if name in keys}
        written = {
            key: _in_stored_form(new.get(key, tensor), tensor) for key, tensor in stored.items()
        }
        linears = {}
        for name in pruned:
            key = keys[f"{name}.weight"]
            rows, columns = stored[key].shape
            linears[name] = check_zeros(name, (rows, columns), stored[key], written[key])
        if written:
            self.sha256[OUTSIDE_SHARD] = save_safetensors(self.folder / OUTSIDE_SHARD, written)
        return linears


def files_to_copy(source: Path) -> list[Path]:
    """The files that a result copies from the pruned checkpoint, including its manifest."""
    found = [path for path in auxiliary_files(source) if not path.name.startswith("prunus-")]
    manifests = [
        source / name for name in (Manifest.FILE, CompressionRecord.FILE, StructureRecord.FILE)
    ]
    return [*found, *(path for path in manifests if path.exists())]


def _in_stored_form(tensor: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """`tensor` in the dtype of `stored`, on the CPU."""
    return tensor.detach().to("cpu", stored.dtype)
