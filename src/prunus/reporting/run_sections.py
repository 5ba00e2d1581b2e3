"""A run as a section: one of `prune` or `compress`, and one of `shrink`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunus.engine.document import (
    Column,
    Facts,
    Lines,
    Section,
    Series,
    Table,
    items_of,
    table_of,
    text_of,
)
from prunus.engine.linear_record import LinearsRecord, mean_error
from prunus.engine.run_record import BlockwiseRecord, bos_words, source_name
from prunus.formats.compression_record import CompressionRecord
from prunus.hardware.sizes import counted, in_bytes
from prunus.pruning.manifest import Manifest
from prunus.structure.structure_record import StructureRecord, what_was_removed

#: Name of an error -> its definition.
_DEFINITIONS = {
    "relative output error": (
        "Relative output error: ‖X(W−Ŵ)ᵀ‖² / ‖XWᵀ‖² on the calibration inputs X."
    ),
    "removed energy": (
        "Removed energy: Σ(w−ŵ)²‖x‖² / Σw²‖x‖², the output error if inputs were uncorrelated."
    ),
}


def run_section(manifest: LinearsRecord) -> Section:
    """The section of one run of `prune` or `compress`, finished or not, from its record."""
    totals = manifest.all_totals()
    error, mean = mean_error(totals)
    mean_words = "not measured" if mean is None else f"{mean:.3%}"
    facts = [*_sizes(manifest, totals), (f"mean {error}", mean_words)]
    # The mean error of each block, where it was measured.
    errors: dict[int, float] = {}
    for number, block in enumerate(manifest.blocks):
        if of_block := [x.error for x in block.linears.values() if x.error is not None]:
            errors[number] = sum(of_block) / len(of_block)
    by_block = lines_over_blocks(f"Mean {error} by block", error, {error: errors}, ".3%")
    work = manifest.what
    if isinstance(manifest, CompressionRecord):
        work += " per weight" if manifest.recipe.bits else ""
    elif isinstance(manifest, Manifest):
        recipe = manifest.recipe
        shape = recipe.pattern if recipe.n_of_m else f"{recipe.sparsity:.0%} unstructured"
        work += f", {shape}"
    return Section(
        f"{source_name(manifest)}: {work}",
        "" if mean is None else _DEFINITIONS[error],
        (headline(manifest, totals, facts), *([by_block] if errors else []), manifest.table()),
        (*circumstances(manifest), _by_linear(manifest, error)),
    )


def circumstances(record: BlockwiseRecord) -> list[Facts]:
    """What the result of a run depends on: recipe, inputs and machine."""
    inputs = record.inputs
    facts = {
        "calibration text": inputs.calibration,
        "windows begin": bos_words(inputs.bos),
        "calibration sha256": inputs.calibration_sha256,
        "checkpoint fingerprint": inputs.checkpoint,
        "computed in": f"{inputs.dtype} ({inputs.dtype_reason})",
        "windows per forward pass": inputs.batch,
    }
    return [
        Facts("Recipe", items_of(record.recipe.model_dump())),
        Facts("Inputs", items_of(facts)),
        Facts("Machine", items_of(record.hardware | record.versions)),
    ]


def lines_over_blocks(
    title: str, y_title: str, lines: Mapping[str, Mapping[int, float]], form: str
) -> Lines:
    """A chart of one figure per block.

    Args:
        title: Heading of the chart.
        y_title: Title of the y axis, without a unit.
        lines: Name of a line -> number of a block -> figure.
        form: Format of the figures. One that ends in % draws shares as percent.
    """
    scale, unit = (100, ", %") if form.endswith("%") else (1, "")
    series = tuple(
        Series(
            name,
            tuple(values),
            tuple(scale * y for y in values.values()),
            tuple(f"{name}, block {number}: {text_of(y, form)}" for number, y in values.items()),
        )
        for name, values in lines.items()
    )
    return Lines(title, "block", y_title + unit, series, round_ticks=True)


def headline(
    record: BlockwiseRecord, totals: Mapping[str, Any], items: list[tuple[str, str]]
) -> Facts:
    """The facts that stand out: how far a run is, `items`, and the time and memory that it took.

    Args:
        record: The record of the run.
        totals: Its totals. Without `seconds` or `peak_memory_bytes` that fact is left out.
        items: Name and text of what the run reached. The list is extended.
    """
    if record.state != "finished":
        items = [("state", f"unfinished: {counted(len(record.blocks), 'block')} done"), *items]
    if "seconds" in totals:
        items.append(("time", f"{totals['seconds']:.1f} s"))
    if "peak_memory_bytes" in totals:
        items.append(("peak memory", f"{totals['peak_memory_bytes'] / 1e9:.2f} GB"))
    return Facts("Headline", tuple(items), headline=True)


def _sizes(manifest: LinearsRecord, totals: dict[str, Any]) -> list[tuple[str, str]]:
    """How sparse the result is, and how small."""
    counts = f"{totals['zeros']:,} of {totals['weights']:,}"
    if not isinstance(manifest, CompressionRecord):
        return [("sparsity reached", f"{totals['sparsity']:.2%}"), ("weights removed", counts)]
    reached, size, recipe = totals.get("bits"), manifest.size, manifest.recipe
    bits = "not known yet" if reached is None else f"{reached:.3f}"
    asked = f"{recipe.bits:g}" if recipe.bits else f"a file of {recipe.target}"
    return [
        *(
            []
            if size is None
            else [
                ("file", f"{in_bytes(size.after)} of {in_bytes(size.before)}"),
                ("bits per parameter of the file", f"{size.bits_per_parameter:.2f}"),
            ]
        ),
        ("bits per weight of the linears", f"{bits} (asked for: {asked})"),
        ("zeros", f"{totals['sparsity']:.2%}: {counts}"),
    ]


def _by_linear(manifest: LinearsRecord, error: str) -> Table:
    rows = [
        {
            "block": number,
            "linear": f"{block.name}.{name}",
            "out × in": " × ".join(map(str, x.shape)),
            "zeros": x.zeros,
            "sparsity": x.sparsity,
            "bits": x.bits,
            error: x.error,
            "seconds": x.seconds,
            "notes": "; ".join(f"{key}: {value}" for key, value in x.notes.items()) or None,
        }
        for number, block in enumerate(manifest.blocks)
        for name, x in block.linears.items()
    ]
    forms = {"block": "d", "zeros": ",d", "sparsity": ".2%", "bits": ".3f", error: ".3%"}
    return table_of(f"All {counted(len(rows), 'linear')}", rows, forms | {"seconds": ".3f"})


# --- a model that was made smaller ---


def structure_section(record: StructureRecord) -> Section:
    """The section of a run that made a model smaller, finished or not, from its record."""
    totals = record.totals
    items: list[tuple[str, str]] = []
    if "parameters" in totals:
        before, after = totals["parameters_before"], totals["parameters"]
        items = [
            ("parameters", f"{after:,} of {before:,} ({after / before:.1%})"),
            ("blocks", f"{len(record.blocks)}"),
        ]
    return Section(
        f"{source_name(record)}, made smaller",
        parts=(headline(record, totals, items), structure_table(record), *_repairs(record)),
        details=tuple(circumstances(record)),
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
