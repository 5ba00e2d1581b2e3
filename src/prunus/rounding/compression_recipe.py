"""The options of compress. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import SerializerFunctionWrapHandler, field_validator, model_serializer

from prunus.engine.linear_options import ExtraSteps, PresetOptions
from prunus.engine.run_options import GIVEN
from prunus.methods.method_options import DenseWeight
from prunus.model.formats import FORMATS, folder_formats
from prunus.options import Option, Range, at_least, one_of
from prunus.rounding.llama_cpp import (
    PRESETS,
    SPEEDS,
    TYPE_NAMES,
    check_type,
    preset_named,
    times_of,
)
from prunus.words import in_bytes, parse_bytes

# The type that folders have, and no GGUF file.
_OF_FOLDERS = "NVFP4"


class CompressionRecipe(PresetOptions):
    """One run of compress, in the words of the command line.

    Attributes:
        bits: The bits per weight of the linears in the result, 1 to 9.
        size: The most bytes of the files with weights, or the preset of llama.cpp whose file has
            them.
        format: The format of a folder. The name of a file implies its own.
        type: The type of all linears, of GGUF or NVFP4 or MXFP4 in a folder.
        types_from: A file with the type of each tensor of a GGUF file: another one, or a list as
            llama-quantize takes it. Of these four, one is given, and the others are None.
        template: A GGUF file of the same model in full precision, as llama.cpp's converter makes
            it. The result has its tensors, fields and tokenizer. None takes what is known of the
            family.
        head_bits: The bits per weight of embeddings and head, "none" to keep them as they are, or
            None to choose their types as those of all weights.
        rounding: "feedback" lets later columns correct the error of each, which needs all windows
            to run through the model; "nearest" rounds each weight by itself.
        fast_on: The processor on which a GGUF file is to decode as fast as llama.cpp's
            presets of its size, a key of `llama_cpp.SPEEDS` or a file of measurements; None for the
            least loss, however fast it decodes.
        tune: The tokens on which scales are trained after the last block; 0 for none.
        reconstruct: The blocks in which what follows attention is trained before it is rounded.
        dense_weight: α, see `methods/dense_targets.py`.
        preset: A tested set of options, which explicit options override.
        samples: The number of windows.

    Raises:
        ValueError: An option is unknown or out of range, or options exclude each other.

    >>> recipe = CompressionRecipe(bits=4)
    >>> recipe.format, recipe.dense_weight
    ('compressed-tensors', 0.25)
    """

    # Chosen by measurement; docs/results/index.md has the figures.
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {"rounding": "nearest", "samples": 64, "tune": 0},
        "balanced": {"rounding": "feedback", "samples": 128, "tune": 15_360},
        "best": {"rounding": "feedback", "samples": 256, "tune": 92_160, "reconstruct": "all"},
    }
    ELSEWHERE: ClassVar[dict[str, str]] = {
        "propagate": "compress always runs one pass",
        "head": "it prunes the head, and head_bits compresses it",
        **dict.fromkeys(
            (
                *("method", "sparsity", "sparsity_of", "pattern", "group", "allocation"),
                "weight_update",
            ),
            "it removes weights, and no file of compress gets smaller by zeros; use prunus prune",
        ),
    }

    bits: Annotated[
        float | None,
        Option(
            "Store linears in N bits per weight, 1 to 9. Folders for vLLM add scales: 4 takes up "
            "to 4.25.",
            metavar="N",
            within=Range(lambda bits: 1 <= bits <= 9, "be from 1 to 9, such as 4 or 4.5"),
        ),
    ] = None
    size: Annotated[
        int | str | None,
        Option(
            "Write at most SIZE, such as 900MB or Q4_K_M. A MB has 10^6 bytes, and a "
            "preset of llama.cpp stands for the bytes of its file.",
            metavar="SIZE",
            within=Range(lambda x: isinstance(x, str) or x >= 1, "be at least 1 byte"),
            suggestions=lambda: PRESETS,
        ),
    ] = None
    format: Annotated[
        str,
        Option(
            "Write a folder of this format: mlx is for Macs.",
            metavar="FORMAT",
            within=one_of(folder_formats()),
            suggestions=folder_formats,
        ),
    ] = "compressed-tensors"
    type: Annotated[
        str | None,
        Option(
            "Store linears as a type, such as Q4_K or NVFP4.",
            metavar="TYPE",
            suggestions=lambda: (*TYPE_NAMES, _OF_FOLDERS),
        ),
    ] = None
    types_from: Annotated[
        Path | None,
        Option(
            "Store each tensor as its type in FILE, a GGUF file or a list.",
            metavar="FILE",
            panel="GGUF files",
        ),
    ] = None
    template: Annotated[
        Path | None,
        Option(
            "Write what this GGUF file of MODEL in full precision holds. llama.cpp's converter "
            "makes it, of any family.",
            metavar="FILE",
        ),
    ] = None
    head_bits: Annotated[
        int | Literal["none"] | None,
        Option(
            "Store embeddings and head in 4, 6, 8 bits or none.",
            metavar="N",
            within=one_of((4, 6, 8, "none")),
            default="as the format chooses for the least loss",
        ),
    ] = None
    rounding: Annotated[
        Literal["feedback", "nearest"],
        Option(
            "Let later columns correct rounding errors (feedback), or do not (nearest). nearest is "
            "for GGUF files and compressed-tensors: it loses more, and takes a fraction of the "
            "time.",
            metavar="RULE",
        ),
    ] = "feedback"
    fast_on: Annotated[
        str | None,
        Option(
            "Choose GGUF types that decode fast on cpu, avx2, avx512 or by times in a file. They "
            "are nearly as fast as llama.cpp's presets of this size, and the file loses more.",
            metavar="CPU",
            suggestions=lambda: SPEEDS,
        ),
    ] = None
    tune: Annotated[
        int,
        Option(
            "Train scales on N tokens towards the dense model. They take no bytes; 0 trains "
            "nothing.",
            metavar="N",
            within=at_least(0, " tokens"),
            default="by preset",
        ),
    ] = PRESETS["balanced"]["tune"]
    reconstruct: Annotated[
        Literal["none", "all"],
        Option(
            "Before it is rounded, train what follows attention towards the dense model, in all "
            "blocks or none.",
            metavar="BLOCKS",
            default="by preset",
        ),
    ] = "none"
    # The figures behind these defaults are in docs/results/index.md.
    dense_weight: DenseWeight = 0.25
    preset: Annotated[str, PresetOptions.declared()["preset"]] = "balanced"
    samples: Annotated[int, replace(PresetOptions.declared()["samples"], default="by preset")] = (
        PRESETS["balanced"]["samples"]
    )

    @classmethod
    def filled_in(cls, values: dict[str, Any]) -> dict[str, Any]:
        """See `PresetOptions`. What the caller calibrates on is too little text to train on.

        >>> CompressionRecipe(bits=4, preset="fast", samples=8).rounding
        'nearest'
        >>> CompressionRecipe(bits=4).tune, CompressionRecipe(bits=4, calibration="texts").tune
        (15360, 0)
        """
        if values.get("calibration") in GIVEN:
            values = {"tune": 0, "reconstruct": "none"} | values
        if values.get("rounding") == "nearest":
            values = {"reconstruct": "none"} | values
        if values.get("preset") == "fast" and values.get("format") == "mlx":
            # It has no rounding to nearest.
            values = {"rounding": "feedback", "samples": 16} | values
        return super().filled_in(values)

    @field_validator("format", mode="before")
    @classmethod
    def _names_folder(cls, value: Any) -> Any:
        for entry in FORMATS:
            if entry.suffix and entry.name == str(value).lower():
                raise ValueError(
                    f"{value} is the format of a file: name the output OUT{entry.suffix}, and "
                    "leave `format` out"
                )
        return value

    @field_validator("size", mode="before")
    @classmethod
    def _read_size(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return preset_named(value) or parse_bytes(value, 1000)

    def check_early(self, model: str | Path) -> None:
        """Check the names in `type` and `fast_on`, and by the headers of a folder the `size`.

        It is quick, and says nothing of a size that some format may reach: the plan knows the
        exact range.

        Raises:
            ValueError: A name is unknown, or less than one bit would be left for each weight.
        """
        if self.type not in (None, _OF_FOLDERS):
            check_type(self.type)
        if self.fast_on is not None:
            times_of(self.fast_on)
        count = 0
        # What is wrong with a file is said when it is opened.
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            count = sum(map(_weights_in, Path(model).glob("*.safetensors")))
        if isinstance(self.size, int) and 8 * self.size < count:
            raise ValueError(
                f"{self.target} is not possible: {model} has {count:,} weights, so that is "
                f"{8 * self.size / count:.2f} bits for each, and no type takes fewer than 2. "
                f"`prunus plan {model} OUT.gguf --bits 4` says how large llama.cpp's presets are"
            )

    def check_fit(self) -> None:
        """Check that exactly one option says how small, and that no option is without effect.

        Raises:
            ValueError: It does not hold; the message says what to give or to drop.
        """
        if (self.bits, self.size, self.type, self.types_from).count(None) != 3:
            raise ValueError(
                "give either `bits`, such as 3, the `size` of the file, such as 900MB or Q4_K_M, "
                "the `type` of a GGUF file, such as Q4_K, or `types_from`, a file with types"
            )
        if self.fast_on is not None and self.gives_types:
            raise ValueError(
                "`fast_on` chooses types, and `type` or `types_from` gives them: drop one of the "
                "two"
            )
        fields = type(self).model_fields
        changed = [x for x in sorted(self.unused) if getattr(self, x) != fields[x].default]
        if changed:
            raise ValueError(
                f"{', '.join(changed)} would change the feedback between columns, and with "
                "`rounding` nearest there is none: drop one of the two"
            )

    @property
    def unused(self) -> set[str]:
        """The options without effect: those of feedback, if there is none."""
        return (
            {"damping", "dense_weight", "min_expert_tokens", "reconstruct"}
            if self.rounding == "nearest"
            else set()
        )

    @property
    def gives_types(self) -> bool:
        """Whether the types are given, and not chosen by their losses."""
        return self.type is not None or self.types_from is not None

    @property
    def extras(self) -> ExtraSteps:
        """The option `reconstruct`: weights learn before they are rounded."""
        return ExtraSteps(reconstruct=self.reconstruct, before=True)

    @property
    def rounds(self) -> str:
        """How weights become integers."""
        return self.rounding

    @property
    def target(self) -> str:
        """What was asked for, in words."""
        if isinstance(self.size, str):
            return f"the size of {self.size}"
        if self.size is not None:
            return in_bytes(self.size)
        return str(self.type or self.types_from or f"{self.bits:g} bits")

    @model_serializer(mode="wrap")
    def _without_unused(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # The default format is not named: a file has another one.
        default = {"format"} if self.format == type(self).model_fields["format"].default else set()
        unused = self.unused | default
        return {name: value for name, value in dump(self).items() if name not in unused}


def _weights_in(file: Path) -> int:
    """How many numbers the header of a safetensors file names."""
    with file.open("rb") as stream:
        length = min(int.from_bytes(stream.read(8), "little"), 10**8)
        tensors = json.loads(stream.read(length))
    return sum(math.prod(x["shape"]) for name, x in tensors.items() if name != "__metadata__")
