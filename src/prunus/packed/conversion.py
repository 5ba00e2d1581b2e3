"""A folder that is written shard by shard from another one, and resumes after a kill.

This file knows folders and shards; the caller decides what happens to the tensors. A shard enters
the record after it has its final name. The index comes last: without it no loader finds the
weights, so that a half-written folder is never taken for a model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prunus.model.checkpoint.atomic_files import (
    fsync_folder,
    make_folder,
    read_json,
    remove_temporaries,
    write_json,
    write_text,
)
from prunus.model.checkpoint.companions import auxiliary_files, check_companions, copy_companion
from prunus.model.checkpoint.digests import check_shard, fingerprint_with, recorded_digests
from prunus.model.checkpoint.lock import locked
from prunus.model.checkpoint.output_folder import check_apart, check_disk, check_whole, is_vacant
from prunus.model.checkpoint.reader import INDEX_NAME, Checkpoint
from prunus.model.checkpoint.regular_files import read_card
from prunus.model.checkpoint.writer import save_safetensors

__all__ = ["Conversion", "LinearRecord", "Record", "open_conversion"]

_MANIFESTS = ("prunus.json", "prunus-compress.json")


class LinearRecord(BaseModel):
    """What happened to one linear.

    Attributes:
        shape: (out, in).
        kept: number of weights that are not exactly zero.
        stored, rare: as in `description.PackedShape`, for a packed linear.
        packed: whether the result stores it as a bitmap.
        reason: why it is not packed, or None.
        nbytes: bytes of the weight before and after.
        relative_error: ‖W−Ŵ‖² / ‖W‖² where values were rounded to int8, or None.
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
    """What a conversion does and how far it is.

    It lies beside the result as `prunus-pack.json` or `prunus-unpack.json`.
    """

    model_config = ConfigDict(extra="forbid")

    action: Literal["pack", "unpack"]
    source: str = Field(description="the folder or hub id as the user gave it")
    fingerprint: str = Field(
        description="hash of the source's headers and configuration, and of its recorded SHA-256"
    )
    values: str = Field(description="dtype of stored values (pack) or of expanded weights (unpack)")
    shards: dict[str, dict[str, LinearRecord]] = Field(default_factory=dict)
    sha256: dict[str, str] = Field(
        default_factory=dict, description="file name of a shard -> SHA-256 of its bytes"
    )
    finished: bool = False

    @property
    def linears(self) -> dict[str, LinearRecord]:
        return {name: record for shard in self.shards.values() for name, record in shard.items()}

    @property
    def file_name(self) -> str:
        return f"prunus-{self.action}.json"


@contextlib.contextmanager
def open_conversion(
    source: Checkpoint, output: Path, record: Record, overwrite: bool, needed: int
) -> Iterator[Conversion]:
    """A conversion whose folder is held against other runs for the length of a `with` block.

    The arguments and errors are those of `Conversion`.

    Raises:
        FileExistsError: another run holds the folder.
    """
    # The first look refuses a folder of somebody else before a lock is written into it. The second
    # one decides, because another run may finish between the look and the lock.
    Conversion(source, output, record, overwrite, needed)
    with locked(output):
        yield Conversion(source, output, record, overwrite, needed)


class Conversion:
    """Writes the result of one conversion.

    Args:
        source: the checkpoint to read.
        output: folder of the result.
        record: the conversion that is asked for, without shards.
        overwrite: replace an earlier result of the same action.
        needed: bytes of disk that the result takes.

    Raises:
        ValueError: source and output overlap, or the source holds a file that cannot be copied.
        FileExistsError: `output` holds something else, or a conversion of another source or with
            other values.
        OSError: the disk has less than `needed` bytes free.
    """

    def __init__(
        self, source: Checkpoint, output: Path, record: Record, overwrite: bool, needed: int
    ) -> None:
        self.source = source
        self.folder = output
        check_apart(output, source.folder)
        check_companions(source.folder)
        self._card = read_card(source.folder / "README.md")
        recorded = recorded_digests(source.folder)
        source.verify_on_read(recorded)
        fingerprint = fingerprint_with(record.fingerprint, recorded)
        record = record.model_copy(update={"fingerprint": fingerprint})
        self.record = self._earlier(record, overwrite) or record
        if not self.record.finished:
            check_disk(output, needed)

    def _earlier(self, wanted: Record, overwrite: bool) -> Record | None:
        """Return the record of the same conversion in the output folder, if there is one."""
        if is_vacant(self.folder):
            return None
        path = self.folder / wanted.file_name
        if not path.exists():
            raise FileExistsError(
                f"output {self.folder} exists and holds no result of prunus {wanted.action}; it is "
                "left as it is. Choose another folder"
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
                f"{self.folder} holds the result of another {wanted.action} (of {earlier.source}, "
                f"{earlier.values}); choose another folder, or --overwrite"
            )
        if earlier.finished:
            check_whole(self.folder)
        return earlier

    def begin(self) -> None:
        """Create the folder and remove what the record does not name.

        A leftover of an interrupted run must not make half of a result look whole.

        Raises:
            ValueError: a shard of the earlier run was changed.
        """
        make_folder(self.folder)
        for name, expected in self.record.sha256.items():
            if (self.folder / name).exists():
                remedy = "remove it, and the same command makes it again"
                check_shard(self.folder / name, expected, remedy)
        for name in list(self.record.shards):
            if not (self.folder / name).exists():
                del self.record.shards[name]
                self.record.sha256.pop(name, None)
        self._save()
        (self.folder / INDEX_NAME).unlink(missing_ok=True)
        fsync_folder(self.folder)
        for path in self.folder.glob("*.safetensors"):
            if path.name not in self.record.shards:
                path.unlink()
        remove_temporaries(self.folder)

    def commit(
        self, shard: str, tensors: Mapping[str, torch.Tensor], linears: Mapping[str, LinearRecord]
    ) -> None:
        """Write a shard, then enter it in the record."""
        self.source.check_unchanged()
        self.record.sha256[shard] = save_safetensors(self.folder / shard, tensors)
        self.record.shards[shard] = dict(linears)
        self._save()

    def finish(self, config: Mapping[str, Any], card: Callable[[str | None], str]) -> None:
        """Write configuration, model card and auxiliary files, then the index, then close the
        record.

        Args:
            config: content of config.json.
            card: makes the README of the result from the source's README, or from None.
        """
        for path in auxiliary_files(self.source.folder):
            if path.name != "config.json" and not path.name.startswith("prunus-"):
                copy_companion(path, self.folder / path.name)
        for name in _MANIFESTS:
            if (self.source.folder / name).exists():
                copy_companion(self.source.folder / name, self.folder / name)
        write_text(self.folder / "README.md", card(self._card))
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
