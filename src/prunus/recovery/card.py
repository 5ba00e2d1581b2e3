"""The README.md of a result: what was done, and that the rest is the pruned model's."""

from __future__ import annotations

from pathlib import Path

from prunus.recovery.record import RECORD_NAME, RecoveryRecord

__all__ = ["adapter_card", "checkpoint_card"]

_DONE = {
    "lora": "low-rank layers beside its linears (LoRA)",
    "sparse-lora": "low-rank updates of its surviving weights, merged",
    "masked": "training of all its surviving weights",
    "block": "matching of each block's outputs to the dense model's",
}


def checkpoint_card(record: RecoveryRecord, source: Path) -> str:
    """The pruned model's card with a section about its recovery; an earlier such section goes."""
    path = source / "README.md"
    before = path.read_text("utf-8") if path.exists() else f"# {source.name}, recovered\n"
    title = "## Recovery"
    return f"{before.split(title)[0].rstrip()}\n\n{title}\n\n{_told(record)}"


def adapter_card(record: RecoveryRecord, base: str) -> str:
    """The card of an adapter, with the fields that peft's cards have."""
    return f"""---
base_model: {base}
library_name: peft
tags: [lora, pruned, sparse, prunus]
---

# Adapter for {Path(base).name}

{_told(record)}"""


def _told(record: RecoveryRecord) -> str:
    learnt = "the dense model" if record.teacher is not None else "the text alone"
    return (
        f"Recovered by prunus: {_DONE[record.options.mode]}, on {record.inputs.text}, learning from {learnt}. "
        f"Every weight that was pruned is still zero. Figures are in `{RECORD_NAME}`.\n"
    )
