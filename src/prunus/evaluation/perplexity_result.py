"""The perplexity of a model on a text as a record, with the comparison to a reference."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from prunus.calibration.bos import UsedBos
from prunus.evaluation.divergence import Divergence
from prunus.pruning.html_table import html_table

__all__ = ["PerplexityResult"]


@dataclass(frozen=True)
class PerplexityResult:
    """The perplexity of a model on a text, and how it was measured.

    Attributes:
        source: where the text comes from.
        perplexity: exp(loss), or infinity if that does not fit in a float.
        loss: mean cross entropy in nats per token.
        windows: number of windows.
        tokens: windows * seqlen.
        seqlen: tokens per window.
        protocol: text, windows and dtype in words.
        seconds: time of scoring alone, without loading.
        streamed: whether the model went through memory block by block. The perplexity does not
            depend on it.
        bos: whether every window begins with BOS: yes, no, or given where the windows were given.
        divergence: the comparison with a reference model, or None without one.
    """

    source: str
    perplexity: float
    loss: float
    windows: int
    tokens: int
    seqlen: int
    protocol: str
    seconds: float
    streamed: bool = False
    bos: UsedBos = "no"
    divergence: Divergence | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON, which has no infinity: None stands for it.

        Without a reference there is no `divergence`.
        """
        fields = dataclasses.asdict(self)
        divergence = fields.pop("divergence")
        compared = {} if divergence is None else {"divergence": _without_infinity(divergence)}
        return _without_infinity(fields) | compared

    def _repr_html_(self) -> str:
        """The result as a table in a notebook."""
        rows: list[tuple[str, object]] = [
            ("perplexity", f"{self.perplexity:.3f}"),
            ("loss, nats per token", f"{self.loss:.4f}"),
            ("windows", f"{self.windows:,} of {self.seqlen:,} tokens"),
            ("seconds", f"{self.seconds:.1f}"),
        ]
        if (found := self.divergence) is not None:
            rows += [
                (f"KL divergence from {found.reference}", f"{found.kl:.4f}"),
                ("same most likely token", f"{found.same_top:.2%}"),
                ("ratio of the perplexities", f"{found.perplexity_ratio:.4f}"),
            ]
        return html_table(self.source, ("measure", "value"), rows, self.protocol)


def _without_infinity(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in fields.items()
    }
