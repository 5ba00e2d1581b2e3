"""The perplexity of a model on a text as a record, with the comparison to a reference."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from prunus.calibration.bos import UsedBos
from prunus.evaluation.divergence import Divergence

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


def _without_infinity(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in fields.items()
    }
