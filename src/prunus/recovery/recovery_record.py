"""The record of a recovery, `prunus-recovery.json`: its inputs, its options and its figures."""

from __future__ import annotations

import math

from pydantic import Field

from prunus.engine.run_record import RecordPart, RunInputs, RunRecord, UsedBos
from prunus.recovery.recovery_options import RecoveryOptions


class Evaluation(RecordPart):
    """One evaluation of the held-out windows."""

    #: Steps of the optimizer before it.
    step: int
    #: Tokens trained on before it.
    tokens: int
    #: Seconds of training and evaluations before it, over all attempts.
    seconds: float
    #: Mean training loss since the previous evaluation; None at the start.
    training_loss: float | None
    #: Mean next-token cross entropy in nats per token. It is the cross entropy with the text even
    #: if the training minimises something else.
    held_out_loss: float

    @property
    def perplexity(self) -> float:
        """exp of the held-out loss; infinite if that overflows a float.

        >>> Evaluation(
        ...     step=0, tokens=0, seconds=0.0, training_loss=None, held_out_loss=0.0
        ... ).perplexity
        1.0
        """
        return math.exp(self.held_out_loss) if self.held_out_loss < 700 else math.inf


class LinearMask(RecordPart):
    """The zeros of one pruned linear. Every weight that was zero before is zero afterwards."""

    #: (outputs, inputs)
    shape: tuple[int, int]
    #: Zeros in the checkpoint that was trained.
    zeros_before: int
    #: Zeros in the result, at least as many.
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
        recipe: How the model was trained.
        inputs: What was trained, on which text.
        teacher: The dense model as the user named it, or None.
        evaluations: Of the held-out windows; the first one is from before any training.
        best: Position in `evaluations` of the one whose weights are the result; None while the
            training runs.
        linears: Full name -> pruned linear, in mode masked. The other modes change no zeros.
        stopped: Which loss was not finite, so that training ended before the budget was spent; else
            None.
    """

    FILE = "prunus-recovery.json"
    COMMAND = "prunus recover"

    recipe: RecoveryOptions
    inputs: RecoveryInputs
    teacher: str | None
    evaluations: list[Evaluation] = Field(default_factory=list)
    best: int | None = None
    linears: dict[str, LinearMask] = Field(default_factory=dict)
    stopped: str | None = None
