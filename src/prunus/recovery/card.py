"""The README.md of a result: what the recovery did."""

from __future__ import annotations

from pathlib import Path

from prunus.recovery.options import Mode
from prunus.recovery.record import RecoveryRecord
from prunus.runs.card import extended_card, result_card, source_name
from prunus.runs.record import bos_words

_TRAINED: dict[Mode, str] = {
    "lora": "low-rank layers added to its linears (LoRA)",
    "masked": "all its weights except the pruned ones",
    "full": "all its weights",
    "scales": "the row scales and column steps of its linears, norm weights and biases",
}
_KEPT: dict[Mode, str] = {
    "lora": "Every pruned weight is still zero",
    "masked": "Every pruned weight is still zero",
    "full": "Its shapes are those of the smaller model",
    "scales": "All integers are those of the compressed model",
}


def checkpoint_card(record: RecoveryRecord, card: str | None) -> str:
    """The pruned model's card with a section about its recovery."""
    section = f"{_section(record)} Figures are in `{record.FILE}`."
    return extended_card(card, "Recovery", section, name=f"{source_name(record)}, recovered")


def adapter_card(record: RecoveryRecord, base: str, source: Path) -> str:
    """The card of an adapter, with the fields that the cards of peft have."""
    return result_card(
        record,
        "adapter",
        [_section(record)],
        tags=["lora", "pruned", "sparse"],
        fields={"base_model": base, "library_name": "peft"},
        source=source,
    )


def _section(record: RecoveryRecord) -> str:
    target = "the dense model" if record.teacher is not None else "the text alone"
    mode, inputs = record.recipe.mode, record.inputs
    return (
        f"Recovered by prunus. Trained: {_TRAINED[mode]}, on {inputs.text}, "
        f"{bos_words(inputs.bos)}, learning from {target}. {_KEPT[mode]}."
    )
