"""The table of a run that made a model smaller. Every figure stands in its record as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from prunus.runs.record import bos_words
from prunus.structure.card import what_went

if TYPE_CHECKING:
    from prunus.structure.record import StructureRecord

__all__ = ["shown", "structure_table"]


def structure_table(record: StructureRecord) -> Table:
    """Return the fields of the configuration that changed as a table, with totals below it."""
    totals = record.totals
    before, after = totals["parameters_before"], totals["parameters"]
    table = Table(title=f"{record.source}, made smaller", title_justify="left")
    for name, side in (("", "left"), ("before", "right"), ("after", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for field, values in record.config.items():
        table.add_row(field, *(shown(value) for value in values))
    table.add_section()
    table.add_row("parameters", f"{before:,}", f"{after:,} ({after / before:.1%})")
    lines = [
        *what_went(record),
        f"computed in {record.inputs.dtype} on {record.inputs.device}; calibration: "
        f"{record.inputs.calibration}, {bos_words(record.inputs.bos)}",
        f"{totals['seconds']:.0f} s; peak memory {totals['peak_memory_bytes'] / 1e9:.2f} GB",
    ]
    if record.left_out:
        lines.append(
            f"left out, because the model has no place for them: {len(record.left_out)} stored "
            "tensors in the blocks"
        )
    table.caption, table.caption_justify = "\n".join(lines), "left"
    return table


def shown(value: object) -> str:
    """A value of a configuration; of a list only its length."""
    return f"{len(value)} entries" if isinstance(value, list | tuple) else str(value)
