"""A model that was made smaller as a section: what went, why, and what its repair won back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunus.reporting.document import Column, Facts, HeatMap, Lines, Section, Series, Table
from prunus.reporting.run_sections import input_facts, items_of
from prunus.reporting.structure_tables import shown
from prunus.structure.card import what_went

if TYPE_CHECKING:
    from prunus.structure.record import BlockChange, PartChange, StructureRecord

__all__ = ["structure_section"]

_MEASURES = {
    "divergence": "KL divergence, nats per token",
    "influence": "influence: 1 − cosine of the hidden states before and behind a block",
}


def structure_section(record: StructureRecord) -> Section:
    """The section of a run that made a model smaller.

    Args:
        record: of a run that is finished or not.
    """
    parts: list[Any] = [_headline(record), Facts("What went", _numbered(what_went(record)))]
    if record.config:
        rows = tuple((name, *map(shown, values)) for name, values in record.config.items())
        columns = (Column("field"), Column("before"), Column("after"))
        parts.append(Table("Configuration", columns, rows))
    parts += [*_search(record), *_targets(record), *_widths(record), *_experts(record)]
    parts += _repairs(record)
    recipe = record.recipe.model_dump(exclude_none=True)
    parts += [
        Facts("Recipe", items_of(recipe)),
        input_facts(record.inputs),
        Facts("Machine", items_of(record.hardware | record.versions)),
    ]
    return Section(f"{Path(record.source).name or record.source}, made smaller", parts=tuple(parts))


def _headline(record: StructureRecord) -> Facts:
    totals = record.totals
    if record.state != "finished":
        items = [("state", f"unfinished: {len(record.blocks)} blocks are done")]
        return Facts("Headline", tuple(items), headline=True)
    before, after = totals["parameters_before"], totals["parameters"]
    items = [
        ("parameters", f"{after:,} of {before:,} ({after / before:.1%})"),
        ("blocks", f"{len(record.blocks)}"),
        ("time", f"{totals['seconds']:.1f} s"),
        ("peak memory", f"{totals['peak_memory_bytes'] / 1e9:.2f} GB"),
    ]
    return Facts("Headline", tuple(items), headline=True)


def _numbered(lines: Sequence[str]) -> tuple[tuple[str, str], ...]:
    return tuple((str(number), line) for number, line in enumerate(lines, 1))


def _search(record: StructureRecord) -> list[Any]:
    """The search for blocks: what was measured after each step, and for every candidate."""
    steps = record.search
    if not steps:
        return []
    title = _MEASURES[steps[0].measure]
    line = Series(
        name="search",
        x=tuple(range(1, len(steps) + 1)),
        y=tuple(step.value for step in steps),
        hover=tuple(f"block {step.block} goes" for step in steps),
    )
    blocks = tuple(str(index) for index in range(len(steps[0].candidates)))
    rows = tuple(f"step {number}: {step.block} goes" for number, step in enumerate(steps, 1))
    return [
        Lines("The search for blocks", "blocks that go", title, (line,)),
        HeatMap(
            f"Without each block: {title}",
            "block",
            blocks,
            rows,
            tuple(tuple(step.candidates) for step in steps),
            ".4f",
        ),
    ]


def _targets(record: StructureRecord) -> list[Table]:
    """The models that were compared for a target."""
    if not record.targets:
        return []
    rows = tuple((each.blocks, each.width, each.heads, each.value) for each in record.targets)
    columns = (
        Column("blocks that stay", "d"),
        Column("share of the width that goes", ".1%"),
        Column("heads that stay", "d"),
        Column("KL divergence", ".4f"),
    )
    note = "Measured on windows that they were not made with. The smallest divergence wins."
    return [Table(f"Models for {record.recipe.target}", columns, rows, note)]


def _parts(block: BlockChange) -> dict[str, PartChange]:
    """What became narrower in a block, by name."""
    width = block.width
    if width is None:
        return {}
    named = {"channels": width.channels, "heads": width.heads, **width.mlps}
    return {name: part for name, part in named.items() if part is not None}


def _widths(record: StructureRecord) -> list[HeatMap]:
    """The errors where channels and heads are read."""
    found = [_parts(block) for block in record.blocks]
    kinds = tuple(dict.fromkeys(name for parts in found for name in parts))
    if not kinds:
        return []

    def grid(figure: str) -> tuple[tuple[float | None, ...], ...]:
        return tuple(
            tuple(getattr(parts[kind], figure) if kind in parts else None for parts in found)
            for kind in kinds
        )

    blocks = tuple(str(place) for place in range(len(found)))
    title = "Relative error where what became narrower is read"
    return [
        HeatMap(
            f"{title}, before the fit", "block", blocks, kinds, grid("error_before_fit"), ".3%"
        ),
        HeatMap(f"{title}, as it is", "block", blocks, kinds, grid("error"), ".3%"),
    ]


def _experts(record: StructureRecord) -> list[HeatMap]:
    """The saliency of every expert of the old model."""
    layers = [(str(place), block.experts) for place, block in enumerate(record.blocks)]
    found = [(place, experts) for place, experts in layers if experts is not None]
    if not found:
        return []
    count = len(found[0][1].saliency)
    return [
        HeatMap(
            f"Saliency of experts ({record.recipe.saliency})",
            "block",
            tuple(place for place, _ in found),
            tuple(f"expert {number}" for number in range(count)),
            tuple(tuple(each.saliency[number] for _, each in found) for number in range(count)),
            ".4g",
        )
    ]


def _repairs(record: StructureRecord) -> list[Lines]:
    """The error of each block before it was trained and afterwards."""
    charts = []
    for measure, title in (
        ("outputs", "relative error of the block's output"),
        ("logits", "KL divergence of the next token"),
    ):
        found = [
            (place, block.repair)
            for place, block in enumerate(record.blocks)
            if block.repair is not None and block.repair.measure == measure
        ]
        if found:
            lines = (
                _series("before", [(place, each.error_before) for place, each in found]),
                _series("afterwards", [(place, each.error_after) for place, each in found]),
            )
            charts.append(
                Lines(
                    f"Repair: {title}, on windows kept apart",
                    "block",
                    title,
                    lines,
                )
            )
    return charts


def _series(name: str, points: Sequence[tuple[int, float]]) -> Series:
    places, values = zip(*points, strict=True)
    hover = tuple(f"block {place}: {value:.4f}" for place, value in points)
    return Series(name, places, values, hover)
