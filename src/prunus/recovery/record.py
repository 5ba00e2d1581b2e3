"""What a recovery was given, what it did and what came of it: `prunus-recovery.json` beside the result."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from prunus.model.checkpoint.atomic_files import write_json
from prunus.model.checkpoint.records import check_alike, read_record
from prunus.recovery.options import RecoveryOptions

__all__ = [
    "RECORD_NAME",
    "BlockMatch",
    "Evaluation",
    "LinearMask",
    "RecoveryInputs",
    "RecoveryRecord",
]

RECORD_NAME = "prunus-recovery.json"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Evaluation(_Model):
    """The held-out windows scored once.

    Attributes:
        step: steps of the optimiser before it.
        tokens: that were trained on before it.
        seconds: of training and scoring before it.
        training_loss: mean of the loss since the evaluation before; None at the start.
        held_out_loss: mean next-token cross entropy in nats per token, whatever the training minimises.
    """

    step: int
    tokens: int
    seconds: float
    training_loss: float | None
    held_out_loss: float

    @property
    def perplexity(self) -> float:
        """exp of the held-out loss; infinite where that is too large."""
        return math.exp(self.held_out_loss) if self.held_out_loss < 700 else math.inf


class LinearMask(_Model):
    """A pruned linear before and after: `shape` is (out, in); no weight that was zero is anything else now."""

    shape: tuple[int, int]
    zeros_before: int
    zeros_after: int


class BlockMatch(_Model):
    """A block that was matched; errors are relative to the dense outputs' squared norm, None where nothing is pruned."""

    name: str
    error_before: float | None
    error_after: float | None
    steps: int
    seconds: float
    stopped: str | None
    linears: dict[str, LinearMask]


class RecoveryInputs(_Model):
    """What decides the bytes of the result beside the options."""

    checkpoint: str = Field(description="fingerprint of the pruned checkpoint")
    teacher: str | None = Field(description="fingerprint of the dense checkpoint")
    text: str = Field(description="where the windows come from")
    text_sha256: str = Field(description="see TrainingText")
    dtype: str
    dtype_reason: str
    device: str


class RecoveryRecord(_Model):
    """The state of a recovery: `running` until the result is in place, then `finished`.

    Attributes:
        evaluations: of the held-out windows, the first before any training; none in mode block.
        best: number of the evaluation whose weights are the result.
        blocks: finished ones, in mode block.
        linears: full name -> what became of a pruned linear; empty for lora, which changes none.
        stopped: why training ended before the budget was spent.
        diverged: whether that was because the loss was not finite.
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
    blocks: list[BlockMatch] = Field(default_factory=list)
    linears: dict[str, LinearMask] = Field(default_factory=dict)
    stopped: str | None = None
    diverged: bool = False
    totals: dict[str, Any] = Field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write `prunus-recovery.json` atomically."""
        write_json(folder / RECORD_NAME, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Path) -> RecoveryRecord:
        """Read `prunus-recovery.json`.

        Raises:
            ValueError: it is damaged or of another version.
        """
        return read_record(folder / RECORD_NAME, cls)

    def check_same(self, options: RecoveryOptions, inputs: RecoveryInputs | None = None) -> None:
        """See that this is the record of the recovery that `options` and, where they are known yet, `inputs` describe.

        Raises:
            FileExistsError: it is of another one; names the first difference.
        """
        before, now = self.options.model_dump(), options.model_dump()
        if inputs is not None:
            before |= self.inputs.model_dump(exclude={"dtype_reason"})
            now |= inputs.model_dump(exclude={"dtype_reason"})
        check_alike(before, now, "recovery")
