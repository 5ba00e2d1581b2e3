"""The options and the records of compress, pack and unpack. Imports no torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from prunus.hardware.sizes import in_bytes, parse_bytes
from prunus.methods.options import DenseWeight
from prunus.options import Option, Options, at_least, between, one_of
from prunus.pruning.manifest import PruningRecord
from prunus.pruning.options import PruningOptions, Sparsity
from prunus.runs.record import Part, RunRecord

#: Options that say which zeros are forced.
_OF_MASKS = (
    "method", "group", "iterations", "refine", "refine_steps", "weight_update", "ria_power",
    "mask_from", "mask_order", "allocation",
)  # fmt: skip


class CompressionRecipe(PruningOptions):
    """One run of compress, in the words of the command line.

    Without a sparsity or a pattern, zeros follow from the rate. Options of masks then have no
    effect: they are refused, and records and cards do not name them.

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

    bits: Annotated[
        float | None,
        Option(
            "Store linears in N bits per weight, 1 to 8.",
            metavar="N",
            within=between("[1, 8]", ": 3 makes the linears a fifth of their bfloat16 size"),
        ),
    ] = None
    size: Annotated[
        int | None,
        Option(
            "Write at most SIZE of weights, such as 900MB. A MB has 10^6 bytes.",
            metavar="SIZE",
            within=at_least(1, " byte"),
        ),
    ] = None
    format: Annotated[
        Literal["packed", "compressed-tensors"],
        Option("Write packed, or compressed-tensors for GPUs.", metavar="FORMAT"),
    ] = "packed"
    type: Annotated[
        str | None,
        Option("Store linears as a GGUF type, such as Q4_K.", metavar="TYPE"),
    ] = None
    template: Annotated[
        Path | None,
        Option(
            "Copy fields and tokenizer of this GGUF file of MODEL.",
            metavar="FILE.gguf",
            panel="GGUF files",
        ),
    ] = None
    head_bits: Annotated[
        int | Literal["none"],
        Option(
            "Store embeddings and head in 4, 6, 8 bits or none.",
            metavar="N",
            within=one_of((4, 6, 8, "none")),
        ),
    ] = 6
    # The figures behind these defaults are in docs/results/index.md.
    sparsity: Sparsity = 0.0
    dense_weight: DenseWeight = 0.25

    @field_validator("size", mode="before")
    @classmethod
    def _read_size(cls, value: Any) -> Any:
        return parse_bytes(value, 1000) if isinstance(value, str) else value

    def check_fit(self) -> None:
        if (self.bits, self.size, self.type).count(None) != 2:
            raise ValueError(
                "give either `bits`, such as 3, the `size` of the file, such as 900MB, or the "
                "`type` of a GGUF file, such as Q4_K"
            )
        fields = type(self).model_fields
        given = [name for name in _OF_MASKS if getattr(self, name) != fields[name].default]
        if given and not self.forces_zeros:
            raise ValueError(
                f"{', '.join(given)} would say which zeros are forced, and none are: give "
                "`sparsity` or `pattern` as well, or drop it, and zeros follow from the rate"
            )

    @property
    def target(self) -> str:
        """What was asked for, in words."""
        if self.size is not None:
            return in_bytes(self.size)
        return self.type or f"{self.bits:g} bits"

    def without_folders(self) -> CompressionRecipe:
        """The recipe as a file for others holds it: of its template it has the name alone."""
        return self.model_copy(update={"template": self.template and Path(self.template.name)})

    @property
    def packs_head(self) -> int | None:
        """The bits per weight of embeddings and head; None where they stay as they are."""
        return None if isinstance(self.head_bits, str) else self.head_bits

    @property
    def forces_zeros(self) -> bool:
        """Whether a mask forces zeros. All other zeros follow from the rate."""
        return self.n_of_m is not None or self.sparsity > 0

    @model_serializer(mode="wrap")
    def _without_masks(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        own = "format" if self.format == "packed" else "head_bits"
        unused = (own, *(() if self.forces_zeros else _OF_MASKS))
        return {name: value for name, value in dump(self).items() if name not in unused}


class FileSize(Part):
    """Bytes of the files with the weights, of the source and of the result, and what takes them."""

    before: int
    after: int
    parameters: int
    bits_per_parameter: float
    parts: dict[str, int]

    @classmethod
    def of(cls, before: int, after: int, parameters: int, parts: Counter[str]) -> FileSize:
        """A size whose largest part is first."""
        sizes = {"before": before, "after": after, "parameters": parameters}
        bits = 8 * after / parameters
        return cls(**sizes, bits_per_parameter=bits, parts=dict(parts.most_common()))

    def sentences(self, linear_bits: float | None = None) -> list[str]:
        """The sizes for people. `linear_bits` is the mean of the linears, in bits per weight."""
        parts = [f"{in_bytes(nbytes)} of {what}" for what, nbytes in self.parts.items()]
        return [
            f"The file takes {in_bytes(self.after)}, and took {in_bytes(self.before)} before: "
            f"{self.bits_per_parameter:.2f} bits per parameter of the file"
            + ("" if linear_bits is None else f", {linear_bits:.3f} bits per weight of the linears")
            + ".",
            f"It holds {', '.join(parts)}.",
        ]


class CompressionRecord(PruningRecord):
    """The record of compress.

    Attributes:
        packed_outside: Stored name of a packed embedding or head -> its entry in config.json.
        types: Name of a linear, an embedding or a head -> its type, in a GGUF file.
        size: Of the result; None before the end of the run.
    """

    FILE: ClassVar[str] = "prunus-compress.json"
    VERB: ClassVar[str] = "prunus compress"
    DONE: ClassVar[str] = "compressed"

    recipe: CompressionRecipe
    packed_outside: dict[str, dict[str, Any]] = Field(default_factory=dict)
    types: dict[str, str] = Field(default_factory=dict)
    size: FileSize | None = None

    @property
    def what(self) -> str:
        return self.recipe.target

    def _notes(self, totals: dict[str, Any]) -> list[str]:
        return [
            *(self.size.sentences(totals.get("bits")) if self.size else []),
            *super()._notes(totals),
        ]


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
