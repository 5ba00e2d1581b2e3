"""For the tests of recovery: a tiny pruned model with a tokenizer, and text that it can learn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import prunus
from prunus.recovery.recovery_record import RecoveryRecord
from prunus.training.loop import Step
from stopping import StopError
from tiny import shards, token_ids  # noqa: F401
from tiny_tokenizer import dense_checkpoint  # noqa: F401

#: A short run that learns: windows of 16 bytes of one repeated sentence.
SHORT: dict[str, Any] = {
    "tokens": 640,
    "seqlen": 16,
    "batch": 2,
    "held_out": 2,
    "evaluations": 4,
    "learning_rate": 1e-2,
    "dtype": "float32",
}


def pruned_checkpoint(folder: Path, dense: Path, **options: Any) -> Path:
    prunus.prune(dense, folder, calibration=token_ids(), dtype="float32", **options)
    return folder


def training_text(folder: Path) -> Path:
    """Write a text that a few training steps can learn."""
    path = folder / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path


def recover(model: Path, output: Path, mode: Any, text: Path, **options: Any) -> RecoveryRecord:
    return prunus.recover(model, output, mode, text=str(text), **(SHORT | options))


def stop_at(fraction: float) -> Callable[[Step], None]:
    """Return a progress callback that raises when this fraction of the budget is spent."""

    def progress(step: Step) -> None:
        if step.fraction >= fraction:
            raise StopError

    return progress
