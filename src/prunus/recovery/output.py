"""The folder of a recovered checkpoint: shards under the pruned checkpoint's own names, and what travels along.

As for a pruning run, a finished shard is a checkpoint of the work, and the index, without which no loader finds
the weights, comes last. Every pruned linear is compared weight by weight before its shard is written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from prunus.model.checkpoint.atomic_files import copy_file, write_json, write_text
from prunus.model.checkpoint.atomic_files import save_safetensors as save
from prunus.model.checkpoint.reader import INDEX_NAME, auxiliary_files
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.pruning.manifest import MANIFEST_NAME
from prunus.pruning.output import OUTSIDE_SHARD, shard_name
from prunus.recovery.masks import verify
from prunus.recovery.record import LinearMask, RecoveryRecord

__all__ = ["ResultFolder", "companions"]


def companions(source: Path) -> list[Path]:
    """Files that a result takes over from the pruned checkpoint as they are, `prunus.json` among them."""
    found = [path for path in auxiliary_files(source) if not path.name.startswith("prunus-")]
    manifest = source / MANIFEST_NAME
    return [*found, manifest] if manifest.exists() else found


class ResultFolder:
    """Writes a recovered checkpoint.

    Args:
        folder: where it goes.
        source: the pruned checkpoint, bound to `skeleton`.
        skeleton: of the model.
        record: entered into as shards are finished.
    """

    def __init__(
        self, folder: Path, source: CheckpointSource, skeleton: Skeleton, record: RecoveryRecord
    ) -> None:
        self.folder = folder
        self.record = record
        self._source = source
        self._skeleton = skeleton

    def write_block(
        self, index: int, changed: Mapping[str, torch.Tensor], pruned: Collection[str]
    ) -> tuple[dict[str, torch.Tensor], dict[str, LinearMask]]:
        """Write a block's shard.

        Args:
            index: position of the block.
            changed: new tensors by relative name, in the model's orientation; stored in the old ones' dtypes.
            pruned: relative names of the pruned linears.

        Returns:
            The block's tensors as written, and its pruned linears before and after.

        Raises:
            RuntimeError: a pruned weight is not zero; nothing is written.
        """
        stored = self._source.block(index)
        written = {
            name: _like(changed.get(name, tensor), tensor) for name, tensor in stored.items()
        }
        prefix = self._skeleton.block_name(index)
        shapes = {linear.name: linear.shape for linear in self._skeleton.linears(index)}
        linears = {
            name: verify(
                f"{prefix}.{name}",
                shapes[name],
                stored[f"{name}.weight"],
                written[f"{name}.weight"],
            )
            for name in pruned
        }
        self._source.checkpoint.check_unchanged()
        save(self.folder / shard_name(index), self._source.as_stored(index, written))
        return written, linears

    def write_outside(
        self, changed: Mapping[str, torch.Tensor], pruned: Collection[str]
    ) -> dict[str, LinearMask]:
        """Write what surrounds the blocks: `changed` tensors and `pruned` linears by the model's full names."""
        stored = dict(self._source.checkpoint.read(self._source.outside_keys()))
        known = self._source.stored_names()
        new = {known[name]: tensor for name, tensor in changed.items() if name in known}
        written = {key: _like(new.get(key, tensor), tensor) for key, tensor in stored.items()}
        linears = {}
        for name in pruned:
            key = known[f"{name}.weight"]
            rows, columns = stored[key].shape
            linears[name] = verify(name, (rows, columns), stored[key], written[key])
        if written:
            save(self.folder / OUTSIDE_SHARD, written)
        return linears

    def finish(self, card: str) -> None:
        """Copy configuration and tokenizer, write card and index; `record` is then closed by the caller."""
        for path in companions(self._source.checkpoint.folder):
            copy_file(path, self.folder / path.name)
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


def _like(tensor: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """`tensor` as it is stored: dtype of `stored`, on the CPU."""
    return tensor.detach().to("cpu", stored.dtype)
