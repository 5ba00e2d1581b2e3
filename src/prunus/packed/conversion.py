"""A folder that is written shard by shard from another, and can be taken up again after a kill.

Knows folders and shards; what happens to the tensors is the caller's. A shard is entered in the record after
it has its final name, and the index, without which no loader finds the weights, comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prunus.model.checkpoint.atomic_files import (
    TEMPORARY_SUFFIX,
    copy_file,
    fsync_folder,
    make_folder,
    read_json,
    save_safetensors,
    write_json,
    write_text,
)
from prunus.model.checkpoint.output_folder import check_apart, check_disk, check_whole, is_vacant
from prunus.model.checkpoint.reader import INDEX_NAME, Checkpoint, auxiliary_files

__all__ = ["Conversion", "LinearRecord", "Record"]

_MANIFEST = "prunus.json"


class LinearRecord(BaseModel):
    """What became of one linear.

    Attributes:
        shape: (out, in).
        kept: weights that are not exactly zero.
        stored, rare: as `description.PackedShape` has them, of a linear that is packed.
        packed: whether it is a bitmap in the result.
        reason: why it is not.
        nbytes: of the weight before and after.
        relative_error: ‖W−Ŵ‖² / ‖W‖² where values were rounded to int8.
    """

    model_config = ConfigDict(extra="forbid")

    shape: tuple[int, int]
    kept: int
    stored: int = 0
    rare: int | None = None
    packed: bool
    reason: str | None = None
    nbytes: tuple[int, int]
    relative_error: float | None = None


class Record(BaseModel):
    """What a conversion does and how far it is, beside the result as `prunus-pack.json` or `prunus-unpack.json`."""

    model_config = ConfigDict(extra="forbid")

    action: Literal["pack", "unpack"]
    source: str = Field(description="the folder or hub id as it was given")
    fingerprint: str = Field(description="of the source's headers and configuration")
    values: str = Field(description="dtype of stored values (pack) or of expanded weights (unpack)")
    shards: dict[str, dict[str, LinearRecord]] = Field(default_factory=dict)
    finished: bool = False

    @property
    def linears(self) -> dict[str, LinearRecord]:
        return {name: record for shard in self.shards.values() for name, record in shard.items()}

    @property
    def file_name(self) -> str:
        return f"prunus-{self.action}.json"


class Conversion:
    """Writes the result of one conversion.

    Args:
        source: the checkpoint that is read.
        output: folder of the result.
        record: the conversion as it is wanted, without shards.
        overwrite: replace an earlier result of the same action.

    Raises:
        ValueError: source and output overlap.
        FileExistsError: something else is in `output`, or a conversion of another source or with other values.
        OSError: the disk is too small for `needed` bytes.
    """

    def __init__(
        self, source: Checkpoint, output: Path, record: Record, overwrite: bool, needed: int
    ) -> None:
        self.source = source
        self.folder = output
        check_apart(output, source.folder)
        self.record = self._earlier(record, overwrite) or record
        if not self.record.finished:
            check_disk(output, needed)

    def _earlier(self, wanted: Record, overwrite: bool) -> Record | None:
        """The record of the same conversion in the output folder, if it holds one."""
        if is_vacant(self.folder):
            return None
        path = self.folder / wanted.file_name
        if not path.exists():
            raise FileExistsError(
                f"output {self.folder} exists and holds no result of prunus {wanted.action}; it is left as it is. "
                "Choose another folder"
            )
        if overwrite:
            return None
        try:
            earlier = Record.model_validate(read_json(path))
        except ValidationError as fault:
            raise ValueError(
                f"{path} is damaged: {fault.errors()[0]['msg']}. --overwrite starts again"
            ) from fault
        same = {"action", "fingerprint", "values"}
        if earlier.model_dump(include=same) != wanted.model_dump(include=same):
            raise FileExistsError(
                f"{self.folder} holds the result of another {wanted.action} (of {earlier.source}, {earlier.values}); "
                "choose another folder, or --overwrite"
            )
        if earlier.finished:
            check_whole(self.folder)
        return earlier

    def begin(self) -> None:
        """Create the folder; what is in it and not in the record goes, so that no half of a result looks whole."""
        make_folder(self.folder)
        for name in list(self.record.shards):
            if not (self.folder / name).exists():
                del self.record.shards[name]
        self._save()
        (self.folder / INDEX_NAME).unlink(missing_ok=True)
        fsync_folder(self.folder)
        for path in self.folder.iterdir():
            stale = path.suffix == ".safetensors" and path.name not in self.record.shards
            if stale or path.name.endswith(TEMPORARY_SUFFIX):
                path.unlink()

    def commit(
        self, shard: str, tensors: Mapping[str, torch.Tensor], linears: Mapping[str, LinearRecord]
    ) -> None:
        """Write a shard, then enter it in the record."""
        self.source.check_unchanged()
        save_safetensors(self.folder / shard, tensors)
        self.record.shards[shard] = dict(linears)
        self._save()

    def finish(self, config: Mapping[str, Any], card: Callable[[str | None], str]) -> None:
        """Write configuration, model card and what travels along, then the index, then close the record.

        Args:
            config: content of config.json.
            card: makes the README from the source's.
        """
        for path in auxiliary_files(self.source.folder):
            if path.name != "config.json" and not path.name.startswith("prunus-"):
                copy_file(path, self.folder / path.name)
        if (self.source.folder / _MANIFEST).exists():
            copy_file(self.source.folder / _MANIFEST, self.folder / _MANIFEST)
        readme = self.source.folder / "README.md"
        write_text(
            self.folder / "README.md", card(readme.read_text("utf-8") if readme.exists() else None)
        )
        write_json(self.folder / "config.json", config)
        shards = Checkpoint(self.folder, only=list(self.record.shards))
        weight_map = {name: info.file for name, info in sorted(shards.tensors.items())}
        total = shards.nbytes(shards.tensors)
        write_json(
            self.folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
        self.record.finished = True
        self._save()

    def _save(self) -> None:
        write_json(self.folder / self.record.file_name, self.record.model_dump())
