"""The options and the records of compress, pack and unpack. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from prunus.methods.options import DenseWeight
from prunus.options import Option, Options, between, one_of
from prunus.pruning.manifest import PruningRecord
from prunus.pruning.options import PruningOptions, Sparsity
from prunus.runs.record import Part, RunRecord


class CompressionRecipe(PruningOptions):
    """One run of compress, in the words of the command line.

    Without a sparsity or a pattern, zeros follow from the rate.

    >>> recipe = CompressionRecipe(bits=3)
    >>> recipe.sparsity, recipe.dense_weight
    (0.0, 0.25)
    """

    ELSEWHERE: ClassVar[dict[str, str]] = {
        "preset": "presets are for prune",
        "propagate": "compress always runs one pass",
        "reconstruct": "it would train weights away from their integers",
        "head": "it prunes the head, and head_bits compresses it",
    }

    # The figures behind these defaults are in docs/results/index.md.
    sparsity: Sparsity = 0.0
    dense_weight: DenseWeight = 0.25
    bits: Annotated[
        float,
        Option(
            "Let the linears take this number of bits per weight in the file, with scales and all "
            "that belongs to them, from 1 to 7.",
            metavar="N",
            within=between("[1, 7]", ": 3 makes the linears a fifth of their bfloat16 size"),
        ),
    ]
    head_bits: Annotated[
        int | None,
        Option(
            "Store embeddings and output head with this number of bits per weight: 4, 6 or 8.",
            metavar="N",
            within=one_of((4, 6, 8)),
            default="they stay as they are",
        ),
    ] = None


class CompressionRecord(PruningRecord):
    """The record of compress.

    Attributes:
        packed_outside: Stored name of a packed embedding or head -> its entry in config.json.
    """

    FILE: ClassVar[str] = "prunus-compress.json"
    VERB: ClassVar[str] = "prunus compress"
    DONE: ClassVar[str] = "compressed"

    recipe: CompressionRecipe
    packed_outside: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @property
    def what(self) -> str:
        return f"{self.recipe.bits:g} bits"


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
