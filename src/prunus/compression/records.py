"""The options and the records of pack and unpack. Imports no torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from prunus.options import Option, Options
from prunus.runs.record import Part, RunRecord


class PackOptions(Options):
    """What decides the bytes of a packed checkpoint."""

    values: Annotated[
        Literal["bf16", "int8"],
        Option(
            "Store the kept weights as they are (bf16), or rounded with one scale per row (int8).",
            metavar="FORMAT",
        ),
    ] = "bf16"


class StoredLinear(Part):
    """How one linear is stored; `stored` and `rare` are as in `PackedShape`."""

    shape: tuple[int, int]  #: (out, in)
    kept: int  #: number of weights that are not exactly zero
    stored: int = 0
    rare: int | None = None
    packed: bool  #: whether the result stores it as a bitmap
    reason: str | None = None  #: why it is not packed
    nbytes: tuple[int, int]  #: of the weight before and after
    relative_error: float | None = None  #: ‖W−Ŵ‖² / ‖W‖² where values were rounded to int8


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
