"""What compress did to a checkpoint, and what takes the bytes of the result. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from prunus.engine.linear_record import LinearsRecord
from prunus.engine.run_record import RecordPart
from prunus.rounding.compression_recipe import CompressionRecipe
from prunus.rounding.llama_cpp_losses import models_of, place
from prunus.training.evaluation import Evaluation
from prunus.words import in_bytes


class FileSize(RecordPart):
    """Bytes of the files with the weights, of the source and of the result, and what takes them.

    Attributes:
        before: Bytes of the source.
        after: Bytes of the result.
        parameters: The number of parameters of the source.
        bits_per_parameter: Bits of the result per parameter, all included.
        parts: What takes bytes of the result, for people -> how many; the largest part is first.
    """

    before: int
    after: int
    parameters: int
    bits_per_parameter: float
    parts: dict[str, int]

    def sentences(self, linear_bits: float | None = None) -> list[str]:
        """The sizes for people.

        Args:
            linear_bits: The mean of the linears, in bits per weight; None to leave it out.
        """
        parts = [f"{in_bytes(nbytes)} of {what}" for what, nbytes in self.parts.items()]
        return [
            f"The result takes {in_bytes(self.after)}, and the model took {in_bytes(self.before)}: "
            f"{self.bits_per_parameter:.2f} bits per parameter with embeddings and head"
            + ("" if linear_bits is None else f", {linear_bits:.3f} bits per weight of the linears")
            + ".",
            f"It holds {', '.join(parts)}.",
        ]


#: What a check records of each text, as `prunus eval --reference` measures it: the mean KL
#: divergence from the dense model in nats per token, its standard error over windows, the share of
#: tokens for which both find the same next token most likely, and how much was scored.
CHECKED = ("kl", "kl_stderr", "same_top", "windows", "seqlen")


class TuningRecord(RecordPart):
    """What the training of scales did; see `compression/tuning.py`.

    Attributes:
        tokens: The tokens that it trains on.
        rate: Its peak learning rate.
        factors: How many numbers were trained.
        evaluations: Divergence from the dense model on held-out windows; the first one is from
            before the training.
        best: Position in `evaluations` of the state that was taken; 0 for none.
        stored_loss: The divergence with what was learnt rounded as it is stored.
        before: File name of a shard -> its SHA-256 before the training, while shards are written.
    """

    tokens: int
    rate: float
    factors: int
    evaluations: list[Evaluation]
    best: int
    stored_loss: float
    before: dict[str, str] = Field(default_factory=dict, exclude_if=lambda x: not x)

    @property
    def helps(self) -> bool:
        """Whether the result is better with what was learnt."""
        return self.best > 0 and self.stored_loss < self.evaluations[0].held_out_loss

    def sentence(self) -> str:
        """What it did, for people."""
        before = self.evaluations[0].held_out_loss
        if not self.helps:
            return (
                f"Training scales on {self.tokens:,} tokens did not lower the divergence "
                f"of {before:.4f} on held-out windows, so the weights stay as they were rounded."
            )
        return (
            f"Scales were trained on {self.tokens:,} tokens: the divergence from the "
            f"dense model on held-out windows fell from {before:.4f} to {self.stored_loss:.4f}."
        )


def unmatched_sentences(unmatched: Mapping[str, Iterable[str]]) -> list[str]:
    """What a template and its checkpoint do not have in common, for people.

    >>> unmatched_sentences({"the template": ["rope_freqs.weight"]})
    ['Only the template has rope_freqs.weight.']
    """
    return [
        f"Not compared with what llama.cpp computes: {', '.join(names)} of config.json."
        if which == "config.json"
        else f"Only {which} has {', '.join(names)}."
        for which, names in unmatched.items()
    ]


class CompressionRecord(LinearsRecord):
    """The record of compress.

    Attributes:
        recipe: How the checkpoint was compressed.
        types: Name of a linear, an embedding or a head -> its type, in formats
            that have types.
        unmatched: "the template" and "the checkpoint" -> names of the tensors that only one of the
            two has, in GGUF files with a template. Those of the template are copied. Numbers in
            names of the checkpoint are replaced by N. "config.json" -> its options of which prunus
            does not know whether llama.cpp computes them.
        tuning: The training of scales; None without one, or before it.
        size: Of the result; None before the end of the run.
        check: Text -> how far the result is from the dense model, the figures of `CHECKED`, and the
            `architecture` of the model in llama.cpp's words; empty where that was not scored.
    """

    FILE: ClassVar[str] = "prunus-compress.json"
    COMMAND: ClassVar[str] = "prunus compress"

    recipe: CompressionRecipe
    types: dict[str, str] = Field(default_factory=dict)
    unmatched: dict[str, list[str]] = Field(default_factory=dict)
    size: FileSize | None = None
    tuning: TuningRecord | None = Field(default=None, exclude_if=lambda x: x is None)
    check: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _has_no_tuning(cls, values: Any) -> Any:
        # Records of versions before 0.5 know no training.
        if isinstance(values, dict) and isinstance(values.get("recipe"), dict):
            values["recipe"].setdefault("tune", 0)
        return values

    def forget_missing(self, missing: set[str]) -> bool:
        """See `BlockwiseRecord`. Trained shards belong together, so all are made again."""
        if self.tuning is not None and missing & self.sha256.keys():
            self.tuning, missing = None, set(self.sha256)
        return super().forget_missing(missing)

    def check_sentences(self) -> list[str]:
        """What the check found, for people; empty without one."""
        return [
            f"KL divergence from the dense model on {text}: {check['kl']:.5f}"
            + (f" ± {check['kl_stderr']:.5f}" if check["kl_stderr"] is not None else "")
            + f" nats per token; the same top token for {check['same_top']:.1%} "
            f"({check['windows']} windows of {check['seqlen']} tokens). In llama.cpp's formats of "
            f"{models_of(kind := check.get('architecture', ''))}, that is "
            f"{place(check['kl'], text, kind)}."
            for text, check in self.check.items()
        ]

    @property
    def stored_types(self) -> dict[str, tuple[str, float]]:
        """Full name of a linear -> its type and its bits per weight."""
        return {
            f"{block.name}.{name}": (self.types[f"{block.name}.{name}"], linear.bits or 0.0)
            for block in self.blocks
            for name, linear in block.linears.items()
        }

    @property
    def what(self) -> str:
        """What was asked for, in words."""
        return self.recipe.target

    def _notes(self, totals: dict[str, Any]) -> list[str]:
        linears = [linear for block in self.blocks for linear in block.linears.values()]
        kept = sum("kept_values" in linear.notes for linear in linears)
        words = (
            f"{kept} of {len(linears)} linears keep their values: they were those of their types "
            "already. A larger file would lose no less in them."
        )
        return [
            *([words] if kept else []),
            *(self.size.sentences(totals.get("bits")) if self.size else []),
            *([self.tuning.sentence()] if self.tuning else []),
            *self.check_sentences(),
            *unmatched_sentences(self.unmatched),
            *super()._notes(totals),
        ]
