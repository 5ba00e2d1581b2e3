"""The options of compress. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import SerializerFunctionWrapHandler, field_validator, model_serializer

from prunus.engine.linear_options import PruningOptions, Sparsity
from prunus.hardware.sizes import in_bytes, parse_bytes
from prunus.methods.options import DenseWeight
from prunus.model.formats import folder_formats
from prunus.options import Option, at_least, between, one_of


class CompressionRecipe(PruningOptions):
    """One run of compress, in the words of the command line.

    Without a sparsity or a pattern, zeros follow from the rate. Options of masks then have no
    effect: they are refused, and records and cards do not name them.

    Attributes:
        bits: The bits per weight of the linears in the result, 1 to 8; None with `size` or `type`.
        size: The most bytes of the files with weights; None with `bits` or `type`.
        format: The format of a folder. The name of a file implies its format.
        type: The GGUF type of all linears, or a file with the type of each tensor: a GGUF file, or
            a list as llama-quantize takes it. None with `bits` or `size`.
        template: A GGUF file of the same model in full precision, as llama.cpp's converter makes
            it. The result has its tensors, fields and tokenizer. None takes what is known of the
            family.
        head_bits: The bits per weight of embeddings and head, or "none" to keep them as they are.
        rounding: "feedback" lets later columns correct the error of each, which needs all windows
            to run through the model; "nearest" rounds each weight by itself.
        fast_on: The processor on which a GGUF file is to decode as fast as llama.cpp's
            presets of its size, a key of `gguf/speeds.SPEEDS` or a file of measurements; None for
            the least loss, however fast it decodes.
        sparsity: The share of the weights that a mask forces to 0.
        dense_weight: α, see `methods/dense_targets.py`.

    Raises:
        ValueError: An option is unknown or out of range, or options exclude each other.

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
        str,
        Option(
            "Write packed, compressed-tensors for GPUs, or mlx.",
            metavar="FORMAT",
            within=one_of(folder_formats()),
            suggestions=folder_formats,
        ),
    ] = "packed"
    type: Annotated[
        str | None,
        Option(
            "Store linears as a GGUF type, such as Q4_K, or all tensors as FILE has them.",
            metavar="TYPE",
        ),
    ] = None
    template: Annotated[
        Path | None,
        Option(
            "Write what this GGUF file of MODEL in full precision holds, made by llama.cpp's "
            "converter: any family.",
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
    rounding: Annotated[
        Literal["feedback", "nearest"],
        Option(
            "Let later columns correct the errors of earlier ones (feedback), or round each weight "
            "by itself (nearest), which loses more and takes a fraction of the time.",
            metavar="RULE",
            panel="GGUF files",
        ),
    ] = "feedback"
    fast_on: Annotated[
        str | None,
        Option(
            "Choose types that decode nearly as fast as llama.cpp's presets of this size on a cpu, "
            "on avx2, on avx512 or by times in a file. The file loses more.",
            metavar="CPU",
            panel="GGUF files",
        ),
    ] = None
    # The figures behind these defaults are in docs/results/index.md.
    sparsity: Sparsity = 0.0
    dense_weight: DenseWeight = 0.25

    @field_validator("size", mode="before")
    @classmethod
    def _read_size(cls, value: Any) -> Any:
        return parse_bytes(value, 1000) if isinstance(value, str) else value

    def check_fit(self) -> None:
        """Check that exactly one option says how small, and that no option is without effect.

        Raises:
            ValueError: It does not hold; the message says what to give or to drop.
        """
        if (self.bits, self.size, self.type).count(None) != 2:
            raise ValueError(
                "give either `bits`, such as 3, the `size` of the file, such as 900MB, or the "
                "`type` of a GGUF file, such as Q4_K"
            )
        fields = type(self).model_fields
        changed = [x for x in sorted(self.unused) if getattr(self, x) != fields[x].default]
        if changed:
            raise ValueError(
                f"{', '.join(changed)} would change masks or the feedback between columns, and "
                "with `rounding` nearest there is neither: drop one of the two"
                if self.rounding == "nearest"
                else f"{', '.join(changed)} would say which zeros are forced, and none are: give "
                "`sparsity` or `pattern` as well, or drop it, and zeros follow from the rate"
            )

    @property
    def unused(self) -> set[str]:
        """The options without effect: those of masks and those of feedback, where there is none."""
        of_masks = self.names_of(lambda option: option.decides_zeros)
        of_feedback = {"damping", "dense_weight", "min_expert_tokens"}
        return (set() if self.forces_zeros else of_masks) | (
            of_feedback if self.rounding == "nearest" else set()
        )

    @property
    def target(self) -> str:
        """What was asked for, in words."""
        if self.size is not None:
            return in_bytes(self.size)
        return self.type or f"{self.bits:g} bits"

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
        # Packed is the default, and not named. Other formats may keep the head as it is: what was
        # asked for is named, and the default is not.
        unused = {"format"} if self.format == "packed" else {"head_bits"} - self.model_fields_set
        unused |= self.unused
        return {name: value for name, value in dump(self).items() if name not in unused}
