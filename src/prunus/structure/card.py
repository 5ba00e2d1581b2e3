"""The README.md of a smaller checkpoint, and what went in a few words."""

from __future__ import annotations

from pathlib import Path

from prunus.runs.record import bos_words
from prunus.structure.record import StructureRecord

__all__ = ["structure_card", "what_went"]


def what_went(record: StructureRecord) -> list[str]:
    """One line per kind of part that went."""
    lines = []
    kept = {block.made_from for block in record.blocks}
    gone = [step for step in record.search if step.block not in kept]
    if gone:
        which, last = ", ".join(str(step.block) for step in gone), gone[-1]
        lines.append(f"blocks {which} went; {last.measure} at the last step {last.value:.4f}")
    for each in record.targets:
        width = "full width" if each.width is None else f"a width of {1 - each.width:.3f}"
        heads = "" if each.heads is None else f" and {each.heads} heads"
        lines.append(
            f"measured for {record.recipe.target}: {each.blocks} blocks at {width}{heads}, "
            f"divergence {each.value:.4f}"
        )
    widths = [block.width for block in record.blocks if block.width is not None]
    for name in ("channels", "heads"):
        parts = [part for width in widths if (part := getattr(width, name)) is not None]
        if parts:
            mean = sum(part.error for part in parts) / len(parts)
            lines.append(
                f"{len(parts[0].kept)} {name} stay in each of {len(parts)} blocks; mean relative "
                f"error where they are read {mean:.3%}"
            )
    mlps = [part for width in widths for part in width.mlps.values()]
    if mlps:
        mean = sum(part.error for part in mlps) / len(mlps)
        lines.append(
            f"{len(mlps)} experts and other MLPs of blocks with several became narrower; mean "
            f"relative error where their channels are read {mean:.3%}"
        )
    change = next((block.experts for block in record.blocks if block.experts is not None), None)
    if change is not None:
        count = sum(block.experts is not None for block in record.blocks)
        lines.append(
            f"{len(change.kept)} of {len(change.saliency)} experts stay in each of {count} layers, "
            f"chosen by {record.recipe.saliency}"
        )
    repairs = [block.repair for block in record.blocks if block.repair is not None]
    if repairs:
        end = repairs[-1]
        lines.append(
            f"{len(repairs)} blocks were trained towards the outputs of the model; on the windows "
            f"kept apart the KL divergence is {end.error_after:.4f}, and was "
            f"{end.error_before:.4f} before the last block was trained"
        )
    return lines


def structure_card(record: StructureRecord) -> str:
    """What the checkpoint is, and how it was made.

    Args:
        record: of the finished run.
    """
    name = Path(record.source).name or record.source
    totals = record.totals
    went = "\n".join(f"- {line}." for line in what_went(record))
    return f"""---
tags: [pruned, prunus]
---

# {name}, made smaller

An ordinary checkpoint with {totals["parameters"]:,} of the {totals["parameters_before"]:,} \
parameters of {name}. Its configuration is smaller too, so that it loads like any other model of \
its family.

{went}

Calibration: {record.inputs.calibration}, {bos_words(record.inputs.bos)}. What went is in
`{StructureRecord.FILE}`.

```toml
{record.recipe.to_toml().rstrip()}
```
"""
