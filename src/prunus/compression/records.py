"""The options and the records of pack and unpack. Imports no torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from prunus.engine.record import Part, RunRecord
from prunus.options import Option, Options


class PackOptions(Options):
    """What decides the bytes of a packed checkpoint.

    Attributes:
        values: "bf16" keeps the surviving weights bit for bit, "int8" rounds them.
    """

    values: Annotated[
        Literal["bf16", "int8"],
        Option(
            "Store the kept weights as they are (bf16), or rounded with one scale per row (int8).",
            metavar="FORMAT",
        ),
    ] = "bf16"


class StoredLinear(Part):
    """How one linear is stored.

    Attributes:
        shape: (out, in).
        kept: Number of weights that are not exactly zero.
        stored: Number of stored entries, as in `PackedShape`; 0 where the linear is not packed.
        rare: Number of rare values among coded ones, as in `PackedShape`; None where values are not
            coded.
        packed: Whether the result stores it as a bitmap.
        reason: Why it is not packed; None where it is, and in the record of unpack.
        nbytes: Bytes of the weight before and after.
        relative_error: ‖W−Ŵ‖² / ‖W‖² where values were rounded to int8; None elsewhere.
    """

    shape: tuple[int, int]
    kept: int
    stored: int = 0
    rare: int | None = None
    packed: bool
    reason: str | None = None
    nbytes: tuple[int, int]
    relative_error: float | None = None


class ConversionRecord(RunRecord):
    """The record of `pack` or `unpack`; `inputs.dtype` is that of the weights in the result.

    Attributes:
        shards: File name of a finished shard -> its linears by name.
    """

    shards: dict[str, dict[str, StoredLinear]] = Field(
        default_factory=dict, description="file name of a shard -> its linears"
    )

    @property
    def linears(self) -> dict[str, StoredLinear]:
        """The linears of all shards by name."""
        return {name: linear for shard in self.shards.values() for name, linear in shard.items()}

    def forget_missing(self, missing: set[str]) -> bool:
        """Forget deleted shards with their linears; True if that changed the record."""
        for name in missing:
            self.shards.pop(name, None)
        return super().forget_missing(missing)


class PackRecord(ConversionRecord):
    """The record of `pack`, which is also the file `prunus-pack.json`.

    Attributes:
        recipe: The options of pack.
    """

    FILE: ClassVar[str] = "prunus-pack.json"
    COMMAND: ClassVar[str] = "prunus pack"

    recipe: PackOptions


class UnpackRecord(ConversionRecord):
    """The record of `unpack`, which has no options that decide its bytes."""

    FILE: ClassVar[str] = "prunus-unpack.json"
    COMMAND: ClassVar[str] = "prunus unpack"
