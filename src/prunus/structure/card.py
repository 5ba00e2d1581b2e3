"""The README.md of a smaller checkpoint, and in a few words what was removed."""

from __future__ import annotations

from pathlib import Path

from prunus.runs.record import bos_words, result_card, source_name
from prunus.structure.record import StructureRecord


def what_was_removed(record: StructureRecord) -> list[str]:
    """One line per kind of part that was removed."""
    lines = []
    kept = {block.made_from for block in record.blocks}
    removed = [step for step in record.search if step.block not in kept]
    if removed:
        which, last = ", ".join(str(step.block) for step in removed), removed[-1]
        lines.append(
            f"blocks {which} were removed; {last.measure} at the last step {last.value:.4f}"
        )
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
    changes = [block.experts for block in record.blocks if block.experts is not None]
    if changes:
        lines.append(
            f"{len(changes[0].kept)} of {len(changes[0].saliency)} experts stay in each of "
            f"{len(changes)} layers, chosen by {record.recipe.saliency}"
        )
    repairs = [block.repair for block in record.blocks if block.repair is not None]
    if repairs:
        end = repairs[-1]
        lines.append(
            f"{len(repairs)} blocks were trained towards the outputs of the model; on the "
            f"validation windows the KL divergence is {end.error_after:.4f}, and was "
            f"{end.error_before:.4f} before the last block was trained"
        )
    return lines


def structure_card(record: StructureRecord, source: Path) -> str:
    """What the checkpoint is, and how it was made."""
    name, totals = source_name(record), record.totals
    return result_card(
        record,
        "made smaller",
        [
            f"An ordinary checkpoint with {totals['parameters']:,} of the "
            f"{totals['parameters_before']:,} parameters of {name}. Its configuration is smaller "
            "too, so that it loads like any other model of its family.",
            "\n".join(f"- {line}." for line in what_was_removed(record)),
            f"Calibration: {record.inputs.calibration}, {bos_words(record.inputs.bos)}.",
        ],
        tags=["pruned"],
        source=source,
    )
