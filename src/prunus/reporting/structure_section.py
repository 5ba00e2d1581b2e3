"""A model that was made smaller as a section: what was removed, why, and the effect of repair."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prunus.engine.document import Column, Facts, Lines, Section, Series, Table
from prunus.engine.record import bos_words
from prunus.reporting.run_sections import circumstances, headline, lines_over_blocks
from prunus.structure.records import what_was_removed

if TYPE_CHECKING:
    from prunus.structure.records import StructureRecord

# What the search for blocks measures -> its words.
_MEASURES = {
    "divergence": "KL divergence, nats per token",
    "influence": "influence: 1 − cosine of the hidden states before and after a block",
}


def structure_section(record: StructureRecord) -> Section:
    """The section of a run that made a model smaller, finished or not, from its record."""
    name = Path(record.source).name or record.source
    return Section(
        f"{name}, made smaller",
        parts=(_headline(record), structure_table(record), *_repairs(record)),
        details=(*_search(record), *_widths(record), *circumstances(record)),
    )


def structure_table(record: StructureRecord) -> Table:
    """The fields of the configuration that changed, and below them what was removed and why.

    The total of the parameters is there once the run is finished.
    """
    totals, inputs = record.totals, record.inputs
    lines = [
        *what_was_removed(record),
        f"computed in {inputs.dtype} on {inputs.device}; calibration: {inputs.calibration}, "
        f"{bos_words(inputs.bos)}",
    ]
    total: tuple[str, ...] = ()
    if "parameters" in totals:
        before, after = totals["parameters_before"], totals["parameters"]
        total = ("parameters", f"{before:,}", f"{after:,} ({after / before:.1%})")
        memory = totals["peak_memory_bytes"] / 1e9
        lines.append(f"{totals['seconds']:.0f} s; peak memory {memory:.2f} GB")
    if record.left_out:
        lines.append(
            f"left out, because the model has no place for them: {len(record.left_out)} stored "
            "tensors in the blocks"
        )
    return Table(
        f"{record.source}, made smaller",
        (Column("field"), Column("before"), Column("after")),
        tuple((name, *map(_shown, values)) for name, values in record.config.items()),
        "\n".join(lines),
        total,
    )


def _shown(value: object) -> str:
    """A value of a configuration; of a list only its length."""
    return f"{len(value)} entries" if isinstance(value, list | tuple) else str(value)


def _headline(record: StructureRecord) -> Facts:
    totals, items = record.totals, []
    if "parameters" in totals:
        before, after = totals["parameters_before"], totals["parameters"]
        items = [
            ("parameters", f"{after:,} of {before:,} ({after / before:.1%})"),
            ("blocks", f"{len(record.blocks)}"),
        ]
    return headline(record, totals, items)


def _search(record: StructureRecord) -> list[Lines]:
    """The search for blocks: what was measured after each step."""
    steps = record.search
    if not steps:
        return []
    line = Series(
        name="search",
        x=tuple(range(1, len(steps) + 1)),
        y=tuple(step.value for step in steps),
        hover=tuple(f"block {step.block} removed" for step in steps),
    )
    title = _MEASURES[steps[0].measure]
    return [Lines("The search for blocks", "removed blocks", title, (line,))]


def _widths(record: StructureRecord) -> list[Lines]:
    """The mean error of each block where channels and heads are read."""
    means = {}
    for number, block in enumerate(record.blocks):
        if block.width:
            errors = [part.error for part in block.width.values()]
            means[number] = sum(errors) / len(errors)
    title = "Relative error where what became narrower is read"
    return (
        [lines_over_blocks(title, "mean relative error", {"mean": means}, ".3%")] if means else []
    )


def _repairs(record: StructureRecord) -> list[Lines]:
    """The error of each block before it was trained and afterwards."""
    charts = []
    for measure, title in (
        ("outputs", "relative error of the block's output"),
        ("logits", "KL divergence of the next token"),
    ):
        repairs = {
            number: block.repair
            for number, block in enumerate(record.blocks)
            if block.repair is not None and block.repair.measure == measure
        }
        if repairs:
            lines = {
                "before": {number: repair.error_before for number, repair in repairs.items()},
                "afterwards": {number: repair.error_after for number, repair in repairs.items()},
            }
            charts.append(
                lines_over_blocks(f"Repair: {title}, on windows kept apart", title, lines, ".4f")
            )
    return charts
