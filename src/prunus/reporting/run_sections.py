"""A pruning run as a section, and several runs compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from prunus.engine.linear_record import mean_error
from prunus.engine.record import BlockwiseRecord, bos_words
from prunus.formats.records import CompressionRecord
from prunus.hardware.sizes import counted, in_bytes

if TYPE_CHECKING:
    from prunus.engine.linear_record import PruningRecord

#: Name of an error -> its definition.
_DEFINITIONS = {
    "relative output error": (
        "Relative output error: ‖X(W−Ŵ)ᵀ‖² / ‖XWᵀ‖² on the calibration inputs X."
    ),
    "removed energy": (
        "Removed energy: Σ(w−ŵ)²‖x‖² / Σw²‖x‖², the output error if inputs were uncorrelated."
    ),
}


def run_section(manifest: PruningRecord) -> Section:
    """The section of one run of `prune` or `compress`, finished or not, from its record."""
    error, mean = mean_error(manifest.all_totals())
    errors = {error: _block_errors(manifest)}
    by_block = [lines_over_blocks(f"Mean {error} by block", error, errors, ".3%")]
    recipe, name = manifest.recipe, Path(manifest.source).name or manifest.source
    if isinstance(manifest, CompressionRecord):
        work = manifest.recipe.target + (" per weight" if manifest.recipe.bits else "")
    else:
        shape = recipe.pattern if recipe.n_of_m else f"{recipe.sparsity:.0%} unstructured"
        work = f"{recipe.method}, {shape}"
    return Section(
        f"{name}: {work}",
        "" if mean is None else _DEFINITIONS[error],
        (_headline(manifest), *(by_block if errors[error] else []), manifest.table()),
        (*circumstances(manifest), _by_linear(manifest)),
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


def _block_errors(manifest: PruningRecord) -> dict[int, float]:
    """Block -> mean error of its linears, where it was measured."""
    means = {}
    for number, block in enumerate(manifest.blocks):
        if errors := [
            linear.error for linear in block.linears.values() if linear.error is not None
        ]:
            means[number] = sum(errors) / len(errors)
    return means


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


def _headline(manifest: PruningRecord) -> Facts:
    totals = manifest.all_totals()
    name, error = mean_error(totals)
    mean = f"{error:.3%}" if error is not None else "not measured"
    return headline(manifest, totals, [*_sizes(manifest, totals), (f"mean {name}", mean)])


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


def _sizes(manifest: PruningRecord, totals: dict[str, Any]) -> list[tuple[str, str]]:
    """How sparse the result is, and how small."""
    counts = f"{totals['zeros']:,} of {totals['weights']:,}"
    if not isinstance(manifest, CompressionRecord):
        return [("sparsity reached", f"{totals['sparsity']:.2%}"), ("weights removed", counts)]
    reached, forced = totals.get("bits"), totals.get("forced_zeros", 0)
    size, recipe = manifest.size, manifest.recipe
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
        *([("zeros by a mask", f"{forced:,}")] if forced else []),
    ]


def _by_linear(manifest: PruningRecord) -> Table:
    error, _ = mean_error(manifest.all_totals())
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


def comparison_section(runs: Mapping[str, PruningRecord]) -> Section:
    """The section that compares runs.

    Args:
        runs: Name of a run -> its record; at least two.
    """
    return Section("Runs compared", parts=(_totals(runs), _differences(runs)))


def _totals(runs: Mapping[str, PruningRecord]) -> Table:
    rows = []
    for name, run in runs.items():
        totals = run.all_totals()
        memory = totals.get("peak_memory_bytes")
        rows.append(
            {
                "run": name,
                "method": run.what,
                "sparsity": totals["sparsity"],
                "bits": totals.get("bits"),
                "mean error": mean_error(totals)[1],
                "seconds": totals["seconds"],
                "peak memory, GB": None if memory is None else memory / 1e9,
            }
        )
    forms = {"sparsity": ".2%", "bits": ".3f", "mean error": ".3%", "seconds": ".1f"}
    note = (
        "The error is the relative output error, or the removed energy where a method needs no "
        "Gram matrix; compare it between runs of one kind alone."
    )
    return table_of("Totals", rows, forms | {"peak memory, GB": ".2f"}, note)


def _differences(runs: Mapping[str, PruningRecord]) -> Table:
    """The fields of recipes and inputs in which the runs differ; one column per run."""
    fields_by_run = []
    for run in runs.values():
        inputs = {
            "calibration text": run.inputs.calibration,
            "calibration sha256": run.inputs.calibration_sha256[:12],
            "computed in": run.inputs.dtype,
            "device": run.inputs.device,
        }
        fields_by_run.append(
            dict(items_of({"model": run.source} | run.recipe.model_dump() | inputs))
        )
    rows = [
        (name, *(fields.get(name) for fields in fields_by_run))
        for name in dict.fromkeys(name for fields in fields_by_run for name in fields)
        if len({fields.get(name) for fields in fields_by_run}) > 1
    ]
    columns = (Column("field"), *map(Column, runs))
    note = "" if rows else "The runs have the same recipe and the same inputs."
    return Table("What differs", columns, tuple(rows), note)
