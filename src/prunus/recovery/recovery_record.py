"""The record of a recovery, `prunus-recovery.json`: its inputs, its options and its figures."""

from __future__ import annotations

from pydantic import Field

from prunus.engine.run_record import RecordPart, RunInputs, RunRecord, UsedBos
from prunus.recovery.recovery_options import RecoveryOptions
from prunus.training.evaluation import Evaluation


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
