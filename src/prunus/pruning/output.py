"""The folder a run writes: shards, manifest, and what travels with the weights.

A finished shard is a checkpoint of the run. The index file, without which no loader finds the weights,
comes last: a half-finished folder cannot be mistaken for a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.model.checkpoint.atomic_files import (
    TEMPORARY_SUFFIX,
    copy_file,
    fsync_folder,
    make_folder,
    save_safetensors,
    write_json,
    write_text,
)
from prunus.model.checkpoint.output_folder import check_apart, is_vacant
from prunus.model.checkpoint.reader import INDEX_NAME, Checkpoint, auxiliary_files
from prunus.model.kinds import kind_of
from prunus.model.source import CheckpointSource, tensors_digest
from prunus.pruning.manifest import MANIFEST_NAME, Manifest
from prunus.pruning.records import BlockRecord

__all__ = ["OutputFolder", "bytes_in", "check_output", "check_resume"]

OUTSIDE_SHARD = "outer.safetensors"


def shard_name(index: int) -> str:
    """File name of a block's shard."""
    return f"block-{index:05d}.safetensors"


def check_output(output: Path, source: Path, overwrite: bool) -> Manifest | None:
    """Look at the output folder before any work; returns the manifest of an earlier run, if there is one.

    Raises:
        FileExistsError: something else is there.
        ValueError: output and source are the same folder, or one lies in the other.
    """
    check_apart(output, source)
    if is_vacant(output):
        return None
    if not (output / MANIFEST_NAME).exists():
        raise FileExistsError(
            f"output {output} exists and does not come from prunus; it is left as it is. Choose another folder"
        )
    return None if overwrite else Manifest.load(output)


def check_resume(output: Path, earlier: Manifest | None, resume: bool | None) -> None:
    """See that an unfinished run is there where one is insisted on, and none where one is refused.

    Raises:
        FileNotFoundError, FileExistsError: what to do instead.
    """
    unfinished = earlier is not None and earlier.state == "running"
    if resume is True and not unfinished:
        raise FileNotFoundError(
            f"there is no unfinished run in {output} to resume; leave --resume out to start one"
        )
    if resume is False and unfinished:
        raise FileExistsError(
            f"{output} holds an unfinished run; --overwrite starts again, --resume goes on"
        )


def bytes_in(folder: Path) -> int:
    """Bytes of the files in a folder, 0 where there is none."""
    return (
        sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        if folder.is_dir()
        else 0
    )


class OutputFolder:
    """Writes one run's result. Every method leaves the folder in a state from which the run can go on.

    Of several ranks only the first touches the folder; the others call the same methods and learn what they need from it.
    """

    def __init__(
        self,
        folder: Path,
        source: CheckpointSource,
        manifest: Manifest,
        ranks: Ranks = SINGLE_PROCESS,
        memory: float = float("inf"),
    ) -> None:
        self.folder = folder
        self._ranks = ranks
        self.manifest = manifest
        self._source = source
        self._memory = memory  # bytes that the run may take

    def begin(self, overwrite: bool) -> None:
        """Create the folder, or clean up what a killed run left half-written."""
        kept = self._ranks.on_rank_0(lambda: self._begin(overwrite))
        del self.manifest.blocks[kept:]

    def _begin(self, overwrite: bool) -> int:
        """As `begin`; returns how many blocks the run can go on from."""
        make_folder(self.folder)
        # First the claim to the folder, then the index: what is left of an overwritten result is no model any more.
        self.manifest.save(self.folder)
        (self.folder / INDEX_NAME).unlink(missing_ok=True)
        fsync_folder(self.folder)
        if overwrite:
            for path in self.folder.glob("*.safetensors"):
                path.unlink()
        for path in self.folder.glob(f"*{TEMPORARY_SUFFIX}"):
            path.unlink()
        for index in range(len(self.manifest.blocks)):
            if not (self.folder / shard_name(index)).exists():
                # Somebody took a shard away; what comes after it is made again too.
                del self.manifest.blocks[index:]
                self.manifest.save(self.folder)
                break
        # What surrounds the blocks was looked at just now and is needed next: read from disk once, if it is copied here.
        if not self.manifest.recipe.head and not (self.folder / OUTSIDE_SHARD).exists():
            self._write_outside({})
        return len(self.manifest.blocks)

    def commit_block(
        self,
        index: int,
        stored: Mapping[str, torch.Tensor],
        changed: Mapping[str, torch.Tensor],
        record: BlockRecord,
    ) -> None:
        """Write a block's shard under the checkpoint's own names, then enter it in the manifest.

        Args:
            index: position of the block.
            stored: its tensors as they were, by names relative to the block.
            changed: the pruned ones, by the same names, in their stored dtype and orientation.
            record: what the manifest is to say.
        """
        if self._ranks.rank > 0:
            self.manifest.blocks.append(record)
            return
        tensors = self._source.as_stored(index, {**stored, **changed})
        self._source.checkpoint.check_unchanged()
        save_safetensors(self.folder / shard_name(index), tensors)
        self.manifest.blocks.append(record)
        self.manifest.save(self.folder)

    def read_block(self, index: int) -> Mapping[str, torch.Tensor]:
        """A finished block's tensors by names relative to the block.

        Raises:
            FileExistsError: it was made from other weights than the source has now.
        """
        return self._ranks.tensors_from_rank_0(lambda: self._read_block(index))

    def _read_block(self, index: int) -> dict[str, torch.Tensor]:
        record = self.manifest.blocks[index]
        if tensors_digest(self._source.block(index)) != record.input_sha256:
            raise FileExistsError(
                f"{record.name} of {self._source.checkpoint.folder} is not what {shard_name(index)} in {self.folder} was "
                "made from: the checkpoint was changed since. Put it back as it was, or --overwrite starts again"
            )
        checkpoint = Checkpoint(self.folder, only=[shard_name(index)])
        return self._source.from_stored(index, checkpoint.read(self._source.block_keys(index)))

    def finish(self, trust_remote_code: bool, changed: Mapping[str, torch.Tensor]) -> None:
        """Write what surrounds the blocks, copy config and tokenizer, write card and index, and the closed manifest.

        `changed` holds pruned tensors outside the blocks by the model's names: the head, if it was asked for.
        """
        self._ranks.on_rank_0(lambda: self._finish(trust_remote_code, changed))

    def _finish(self, trust_remote_code: bool, changed: Mapping[str, torch.Tensor]) -> None:
        checkpoint = self._source.checkpoint
        outer = self._source.outside_keys()
        if changed or not (self.folder / OUTSIDE_SHARD).exists():
            self._write_outside(changed)
        for path in auxiliary_files(checkpoint.folder, code=trust_remote_code):
            copy_file(path, self.folder / path.name)
        write_text(
            self.folder / "README.md",
            model_card(self.manifest, kind_of(self._source.config).loader),
        )
        weight_map = dict.fromkeys(outer, OUTSIDE_SHARD)
        for index in range(len(self.manifest.blocks)):
            weight_map |= dict.fromkeys(self._source.block_keys(index), shard_name(index))
        total = checkpoint.nbytes(checkpoint.tensors)
        index_content = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_json(self.folder / INDEX_NAME, index_content)
        self.manifest.save(self.folder)

    def _write_outside(self, changed: Mapping[str, torch.Tensor]) -> None:
        """The shard of everything that belongs to no block, with `changed` tensors by the model's names."""
        keys = self._source.outside_keys()
        if keys:
            replaced = {self._source.stored_name(name): tensor for name, tensor in changed.items()}
            # Where memory is short, what was written would push out what was looked at and is to be copied next.
            uncached = 4 * self._source.checkpoint.nbytes(keys) > self._memory
            tensors = dict(self._source.checkpoint.read(keys)) | replaced
            save_safetensors(self.folder / OUTSIDE_SHARD, tensors, uncached=uncached)


def model_card(manifest: Manifest, loader: str = "AutoModelForCausalLM") -> str:
    """The README.md of the result: what it is, how it was made, and what loads it (a class of transformers)."""
    recipe = manifest.recipe
    shape = recipe.pattern if recipe.n_of_m else f"{recipe.sparsity:.0%} unstructured"
    name = Path(manifest.source).name or manifest.source
    return f"""---
tags: [pruned, sparse, prunus]
---

# {name}, pruned

{name} with {shape} sparsity by {recipe.method}. Shapes, tokenizer and configuration are the source's:
it loads with `{loader}.from_pretrained` and is used like the dense model.

Weights removed: {manifest.totals.get("zeros", 0):,} of {manifest.totals.get("weights", 0):,} in the pruned linears
({manifest.totals.get("sparsity", 0):.2%}). Calibration: {manifest.inputs.calibration}. Per-linear figures are in
`{MANIFEST_NAME}`.

```toml
{recipe.to_toml().rstrip()}
```
"""
