"""Results of evaluation as records. Sweeps keep them in their own, so nothing here needs torch."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, PlainSerializer, TypeAdapter
from pydantic.dataclasses import dataclass

from prunus.runs.document import Column, Measured, Table, text_of


def finite(value: float | None) -> float | None:
    """A value for JSON, which has neither infinity nor NaN: it has None in their place."""
    return value if value is not None and math.isfinite(value) else None


#: A number that may be infinite. JSON has None in its place.
Figure = Annotated[
    float,
    PlainSerializer(finite, return_type=float | None),
    BeforeValidator(lambda value: math.inf if value is None else value),
]
#: A standard error, or None where it is unknown.
Error = Annotated[float | None, PlainSerializer(finite, return_type=float | None)]
_STRICT = ConfigDict(extra="forbid")
#: Title of a column of a table -> format of its figures.
FORMS = {
    "perplexity": ",.3f",
    "residual gap": ".3f",
    "KL divergence": ",.5f",
    "KL 99.9 % quantile": ",.3f",
    "same top token": ".2%",
    "perplexity ratio": ".4f",
    "file, GB": ",.3f",
    "bits per weight": ".2f",
    "decoded tokens/s": ",.1f",
}


class EvaluationRecord:
    """A record that can be written as JSON."""

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON."""
        fields: dict[str, Any] = TypeAdapter(type(self)).dump_python(self, mode="json")
        return fields


@dataclass(frozen=True, config=_STRICT)
class Divergence(EvaluationRecord):
    """How far the predictions of a model are from those of a reference, on the same tokens.

    Standard errors are over windows; they are None for a single window.

    Attributes:
        reference: name of the reference.
        kl: mean of KL(reference ‖ model), in nats per token.
        kl_stderr: its standard error.
        kl_q999: the 99.9 % quantile of the KL divergences of all tokens.
        same_top: share of tokens for which both models find the same next token most likely.
        same_top_stderr: its standard error.
        reference_perplexity: perplexity of the reference.
        perplexity_ratio: perplexity of the model, divided by that of the reference.
        perplexity_ratio_stderr: its standard error, from losses paired by window.
    """

    reference: str
    kl: float
    kl_stderr: Error
    kl_q999: float
    same_top: float
    same_top_stderr: Error
    reference_perplexity: Figure
    perplexity_ratio: Figure
    perplexity_ratio_stderr: Error


@dataclass(frozen=True, config=_STRICT)
class PerplexityResult(EvaluationRecord):
    """The perplexity of a model on a text, and how it was measured.

    Attributes:
        source: where the text was read.
        perplexity: exp(loss), or infinity if that does not fit in a float.
        loss: mean cross entropy in nats per token.
        windows: number of windows.
        tokens: windows * seqlen.
        seqlen: tokens per window.
        protocol: text, windows and dtype in words.
        seconds: time of scoring alone, without loading.
        streamed: whether the model was read block by block. The perplexity does not depend on it.
        bos: whether every window begins with BOS: yes, no, or given where the windows were given.
        divergence: the comparison with a reference model, or None without one.
    """

    source: str
    perplexity: Figure
    loss: float
    windows: int
    tokens: int
    seqlen: int
    protocol: str
    seconds: float
    streamed: bool = False
    bos: Literal["yes", "no", "given"] = "no"
    divergence: Divergence | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON. Without a reference there is no `divergence`."""
        fields = super().as_dict()
        if self.divergence is None:
            del fields["divergence"]
        return fields

    def figures(self) -> dict[str, Any]:
        """The figures of a row of a table, without infinite ones; `FORMS` has their formats."""
        figures: dict[str, Any] = {"perplexity": finite(self.perplexity)}
        if (found := self.divergence) is not None:
            figures |= {
                "KL divergence": Measured(found.kl, found.kl_stderr),
                "KL 99.9 % quantile": found.kl_q999,
                "same top token": Measured(found.same_top, found.same_top_stderr),
                "perplexity ratio": None
                if finite(found.perplexity_ratio) is None
                else Measured(found.perplexity_ratio, found.perplexity_ratio_stderr),
            }
        return figures

    def _repr_html_(self) -> str:
        figures = {name: text_of(value, FORMS[name]) for name, value in self.figures().items()}
        windows = f"{self.windows:,} of {self.seqlen:,} tokens"
        rows = figures | {"windows": windows, "seconds": f"{self.seconds:.1f}"}
        columns = (Column("measure"), Column("value"))
        note = self.protocol
        if self.divergence is not None:
            note += f"\nKL divergence from {self.divergence.reference}, in nats per token"
        return Table(self.source, columns, tuple(rows.items()), note)._repr_html_()


@dataclass(frozen=True, config=_STRICT)
class ModelSize(EvaluationRecord):
    """The size of a model.

    Attributes:
        file_bytes: bytes of its safetensors; an adapter's base is included.
        bits_per_weight: bits of the linears in the blocks, zeros and all parts counted, over their
            number of weights. None where the linears are not known, as for an adapter.
    """

    file_bytes: int
    bits_per_weight: float | None

    def figures(self) -> dict[str, Any]:
        """The figures of a row of a table; `FORMS` has their formats."""
        return {"file, GB": self.file_bytes / 1e9, "bits per weight": self.bits_per_weight}
