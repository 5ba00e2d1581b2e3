"""The record of a recovery, `prunus-recovery.json`: its inputs, its options and its figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from prunus.model.checkpoint.atomic_files import write_json
from prunus.model.checkpoint.records import check_same_work, read_record
from prunus.recovery.options import RecoveryOptions
from prunus.runs.record import UsedBos

__all__ = [
    "RECORD_NAME",
    "Evaluation",
    "LinearMask",
    "RecoveryInputs",
    "RecoveryRecord",
]

RECORD_NAME = "prunus-recovery.json"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Evaluation(_Model):
    """One evaluation of the held-out windows.

    Attributes:
        step: steps of the optimizer before it.
        tokens: tokens trained on before it.
        seconds: of training and evaluation before it.
        training_loss: mean training loss since the previous evaluation; None at the start.
        held_out_loss: mean next-token cross entropy in nats per token. It is the cross entropy with
            the text even if the training minimises something else.
    """

    step: int
    tokens: int
    seconds: float
    training_loss: float | None
    held_out_loss: float

    @property
    def perplexity(self) -> float:
        """exp of the held-out loss; infinite if that overflows."""
        return math.exp(self.held_out_loss) if self.held_out_loss < 700 else math.inf


class LinearMask(_Model):
    """A pruned linear of shape (out, in), before and after.

    Every weight that was zero before is zero afterwards.
    """

    shape: tuple[int, int]
    zeros_before: int
    zeros_after: int


class RecoveryInputs(_Model):
    """What decides the bytes of the result, together with the options."""

    checkpoint: str = Field(description="fingerprint of the pruned checkpoint")
    teacher: str | None = Field(description="fingerprint of the dense checkpoint")
    text: str = Field(description="where the windows come from")
    text_sha256: str = Field(description="see TrainingText")
    dtype: str
    dtype_reason: str
    device: str
    bos: UsedBos = Field("no", description="whether every window begins with BOS")


class RecoveryRecord(_Model):
    """What a recovery did.

    Attributes:
        state: `running` until the result is in place, then `finished`.
        evaluations: of the held-out windows; the first one is from before any training.
        best: number of the evaluation whose weights are the result.
        linears: full name -> pruned linear; empty in modes lora, full and scales, which change no
            zeros.
        stopped: why training ended before the budget was spent, or None.
        diverged: training ended because the loss was not finite.
        sha256: file name of a shard -> SHA-256 of its bytes.
        totals: parameters, zeros, tokens, seconds, memory.
    """

    format: Literal[1] = 1
    state: Literal["running", "finished"] = "running"
    source: str
    teacher: str | None
    options: RecoveryOptions
    inputs: RecoveryInputs
    versions: dict[str, str]
    hardware: dict[str, Any]
    evaluations: list[Evaluation] = Field(default_factory=list)
    best: int | None = None
    linears: dict[str, LinearMask] = Field(default_factory=dict)
    stopped: str | None = None
    diverged: bool = False
    sha256: dict[str, str] = Field(default_factory=dict)
    totals: dict[str, Any] = Field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write `prunus-recovery.json` atomically."""
        write_json(folder / RECORD_NAME, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Path) -> RecoveryRecord:
        """Read `prunus-recovery.json`.

        Raises:
            ValueError: the file is damaged or of another version.
        """
        return read_record(folder / RECORD_NAME, cls)

    def check_same(self, options: RecoveryOptions, inputs: RecoveryInputs | None = None) -> None:
        """Check that this record describes the same recovery.

        Args:
            options: of the recovery that is about to run.
            inputs: its inputs, if they are known already.

        Raises:
            FileExistsError: it is another recovery; the message names the first difference.
        """
        before, now = self.options.model_dump(), options.model_dump()
        if inputs is not None:
            # The options' bos stays: which one it came to shows in the hash of the windows.
            before |= self.inputs.model_dump(exclude={"dtype_reason", "bos"})
            now |= inputs.model_dump(exclude={"dtype_reason", "bos"})
        check_same_work(before, now, "recovery")
