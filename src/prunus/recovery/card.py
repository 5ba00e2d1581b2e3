"""The README.md of a result: what the recovery did."""

from __future__ import annotations

from pathlib import Path

from prunus.recovery.options import Mode
from prunus.recovery.record import RECORD_NAME, RecoveryRecord
from prunus.runs.record import bos_words

__all__ = ["adapter_card", "checkpoint_card"]

_WHAT_WAS_TRAINED: dict[Mode, str] = {
    "lora": "low-rank layers added to its linears (LoRA)",
    "masked": "all its weights except the pruned ones",
    "full": "all its weights",
    "scales": "the row scales and column steps of its linears, norm weights and biases",
}


def checkpoint_card(record: RecoveryRecord, name: str, card: str | None) -> str:
    """Return the pruned model's card with a section about its recovery.

    A section about an earlier recovery is replaced.

    Args:
        record: of the recovery.
        name: of the pruned model.
        card: its card, or None.
    """
    before = card if card is not None else f"# {name}, recovered\n"
    title = "## Recovery"
    return f"{before.split(title)[0].rstrip()}\n\n{title}\n\n{_section(record)}"


def adapter_card(record: RecoveryRecord, base: str) -> str:
    """Return the card of an adapter, with the fields that the cards of peft have."""
    return f"""---
base_model: {base}
library_name: peft
tags: [lora, pruned, sparse, prunus]
---

# Adapter for {Path(base).name}

{_section(record)}"""


def _section(record: RecoveryRecord) -> str:
    target = "the dense model" if record.teacher is not None else "the text alone"
    kept = "Every pruned weight is still zero"
    if record.options.mode == "full":
        kept = "Its shapes are those of the smaller model"
    if record.options.mode == "scales":
        kept = "All integers are those of the compressed model"
    return (
        f"Recovered by prunus. Trained: {_WHAT_WAS_TRAINED[record.options.mode]}, "
        f"on {record.inputs.text}, {bos_words(record.inputs.bos)}, learning from {target}. "
        f"{kept}. Figures are in `{RECORD_NAME}`.\n"
    )
