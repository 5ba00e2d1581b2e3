"""The record of a recovery, `prunus-recovery.json`: its inputs, its options and its figures."""

from __future__ import annotations

import math

from pydantic import Field

from prunus.recovery.options import RecoveryOptions
from prunus.runs.record import Part, RunInputs, RunRecord, UsedBos


class Evaluation(Part):
    step: int  #: step, tokens, seconds: Of the training and its evaluations before this one
    tokens: int
    seconds: float
    #: Mean training loss since the previous evaluation; None at the start.
    training_loss: float | None
    #: Mean next-token cross entropy in nats per token. It is the cross entropy with the text even
    #: if the training minimises something else.
    held_out_loss: float

    @property
    def perplexity(self) -> float:
        """exp of the held-out loss; infinite if that overflows."""
        return math.exp(self.held_out_loss) if self.held_out_loss < 700 else math.inf


class LinearMask(Part):
    """A pruned linear of shape (out, in). Every weight that was zero before is zero afterwards."""

    shape: tuple[int, int]
    zeros_before: int
    zeros_after: int


class RecoveryInputs(RunInputs):
    """What decides the result, with the options; fingerprints cover every byte of the weights."""

    teacher: str | None = Field(description="fingerprint of the dense checkpoint")
    text: str = Field(description="where the windows come from")
    text_sha256: str = Field(description="of its first windows, and of the file if it is one")
    bos: UsedBos = Field(description="whether every window begins with BOS")


class RecoveryRecord(RunRecord):
    """What a recovery did.

    Attributes:
        teacher: The dense model as the user named it, or None.
        evaluations: Of the held-out windows; the first one is from before any training.
        best: Number of the evaluation whose weights are the result.
        linears: Full name -> pruned linear, in mode masked.
        stopped: Why training ended before the budget was spent, or None.
    """

    FILE = "prunus-recovery.json"
    VERB = "prunus recover"

    recipe: RecoveryOptions
    inputs: RecoveryInputs
    teacher: str | None
    evaluations: list[Evaluation] = Field(default_factory=list)
    best: int | None = None
    linears: dict[str, LinearMask] = Field(default_factory=dict)
    stopped: str | None = None
    diverged: bool = False
