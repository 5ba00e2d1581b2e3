"""What `pack` and `unpack` record, and the folder in which they write.

A folder whose record names a shard has that shard; see `prunus.runs.folder`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field

from prunus.distributed import SINGLE_PROCESS
from prunus.model.checkpoint.atomic_files import fingerprint_with, recorded_digests
from prunus.model.checkpoint.output_folder import check_companions, check_disk
from prunus.model.checkpoint.reader import Checkpoint
from prunus.options import Option, Options
from prunus.runs.folder import ResultFolder, find_earlier, held
from prunus.runs.options import RunOptions
from prunus.runs.record import RunInputs, RunRecord

#: Records of earlier work that hold for the packed and for the unpacked model as well.
KEPT_RECORDS = ("prunus.json", "prunus-compress.json")


class PackOptions(Options):
    """What decides the bytes of a packed checkpoint."""

    values: Annotated[
        Literal["bf16", "int8"],
        Option(
            "Store the kept weights as they are (bf16), or rounded with one scale per row (int8).",
            metavar="FORMAT",
        ),
    ] = "bf16"


class StoredLinear(BaseModel):
    """How one linear is stored.

    Attributes:
        shape: (out, in).
        kept: number of weights that are not exactly zero.
        stored, rare: as in `PackedShape`, for a packed linear.
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


class ConversionRecord(RunRecord):
    """The record of `pack` or `unpack`; `inputs.dtype` is that of the weights in the result."""

    shards: dict[str, dict[str, StoredLinear]] = Field(
        default_factory=dict, description="file name of a shard -> its linears"
    )

    @property
    def linears(self) -> dict[str, StoredLinear]:
        """The linears of all shards by name."""
        return {name: each for shard in self.shards.values() for name, each in shard.items()}

    def forget_missing(self, missing: set[str]) -> bool:
        """See the base class."""
        for name in missing:
            self.shards.pop(name, None)
        return super().forget_missing(missing)


class PackRecord(ConversionRecord):
    """The record of `pack`."""

    FILE: ClassVar[str] = "prunus-pack.json"
    VERB: ClassVar[str] = "prunus pack"

    recipe: PackOptions


class UnpackRecord(ConversionRecord):
    """The record of `unpack`, which has no options that decide its bytes."""

    FILE: ClassVar[str] = "prunus-unpack.json"
    VERB: ClassVar[str] = "prunus unpack"


_Record = TypeVar("_Record", bound=ConversionRecord)


def find_inputs(checkpoint: Checkpoint, fingerprint: str, dtype: str, reason: str) -> RunInputs:
    """What the result depends on, of a source whose files can be copied.

    From here on, shards whose SHA-256 was recorded are checked when they are read.
    """
    check_companions(checkpoint.folder)
    recorded = recorded_digests(checkpoint.folder)
    checkpoint.verify_on_read(recorded)
    return RunInputs(
        checkpoint=fingerprint_with(fingerprint, recorded),
        dtype=dtype,
        dtype_reason=reason,
        device="cpu",
    )


@contextlib.contextmanager
def opened(
    record: _Record, output: Path, source: Checkpoint, overwrite: bool, needed: int
) -> Iterator[tuple[ResultFolder, _Record]]:
    """The folder of the result, and the record of an earlier run, or `record` for a new one."""
    kind, options = type(record), RunOptions(overwrite=overwrite)

    def find() -> _Record | None:
        earlier = find_earlier(kind, output, record.recipe, options, source.folder)
        if earlier is not None:
            earlier.check_same_run(record.recipe, record.inputs)
        if earlier is None or earlier.state == "running":
            check_disk(output, needed)
        return earlier

    with held(kind, output, SINGLE_PROCESS, find) as earlier:
        record = earlier or record
        folder = ResultFolder(output, record, source)
        if record.state == "finished":
            folder.check_finished()
        else:
            folder.begin(overwrite)
        yield folder, record


def write_shard(
    folder: ResultFolder,
    record: ConversionRecord,
    shard: str,
    tensors: Mapping[str, torch.Tensor],
    linears: Mapping[str, StoredLinear],
) -> None:
    """Write a shard, then enter it in the record."""
    folder.write_shard(shard, tensors)
    record.shards[shard] = dict(linears)
    folder.save()
