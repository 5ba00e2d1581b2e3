"""A run as a section: one of `prune` or `compress`, and one of `shrink`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

from prunus.document import (
    Column,
    Facts,
    Lines,
    Section,
    Series,
    Table,
    items_of,
    plain_rows,
    short_names,
    table_of,
    text_of,
)
from prunus.engine.linear_record import LinearsRecord, linear_kind, mean_error
from prunus.engine.run_record import BlockwiseRecord, bos_words, source_name
from prunus.pruning.manifest import Manifest
from prunus.rounding.compression_record import CompressionRecord
from prunus.structure.structure_record import StructureRecord, what_was_removed
from prunus.words import counted, in_bytes

#: The sparsity of all linears in the blocks, whether a run changed them or not.
_OF_ALL = "sparsity of all linears"
#: Name of an error -> its definition.
_DEFINITIONS = {
    "relative output error": (
        "Relative output error: ‖X(W−Ŵ)ᵀ‖² / ‖XWᵀ‖² on the calibration inputs X."
    ),
    "removed energy": (
        "Removed energy: Σ(w−ŵ)²‖x‖² / Σw²‖x‖², the output error if inputs were uncorrelated."
    ),
}


def run_section(manifest: LinearsRecord, compared: bool = False) -> Section:
    """The section of one run of `prune` or `compress`, finished or not, from its record.

    Args:
        manifest: The record.
        compared: Whether `runs_section` shows the error of its blocks, beside those of other runs.
    """
    totals = manifest.all_totals()
    error, mean = mean_error(totals)
    mean_words = "not measured" if mean is None else f"{mean:.3%}"
    facts = [*_sizes(manifest, totals), (f"mean {error}", mean_words)]
    charts = [] if compared else _error_charts({error: [manifest]})
    if manifest.allocation:
        title = "Sparsity of the linears by block"
        sparsities = _by_block(manifest, linear_kind, "sparsity")
        charts.append(lines_over_blocks(title, "sparsity", sparsities, ".2%"))
    linears = _by_linear(manifest, error)
    recipe = manifest.recipe.model_dump()
    known: dict[str, Any] = {"model": source_name(manifest), "method": manifest.what}
    known |= {name: recipe.get(name) for name in ("pattern", "sparsity", "seed")}
    return Section(
        f"{source_name(manifest)}: {_work(manifest)}",
        "" if mean is None else _DEFINITIONS[error],
        (headline(manifest, totals, facts), *charts, manifest.table()),
        (*circumstances(manifest), linears),
        plain_rows(
            known | dict(zip((column.title for column in linears.columns), row, strict=True))
            for row in linears.rows
        ),
    )


def runs_section(records: Mapping[str, LinearsRecord]) -> Section:
    """Several runs beside each other: the error of their blocks.

    Runs that differ in nothing but their seed are one line, the mean of these runs.

    Args:
        records: Folder of a run -> its record.
    """
    # Each line has its runs by folder. A run that repeats another one has a line of its own.
    lines: dict[tuple[str, int], dict[str, LinearsRecord]] = {}
    repeats: Counter[str] = Counter()
    for folder, record in records.items():
        recipe = record.recipe.model_dump()
        repeats[f"{record.source} {recipe}"] += 1
        line = f"{record.source} {recipe | {'seed': None}}", repeats[f"{record.source} {recipe}"]
        lines.setdefault(line, {})[folder] = record
    names = _named({min(runs): runs[min(runs)] for runs in lines.values()})
    rows = []
    for name, record in _named(records).items():
        totals = record.all_totals()
        error, mean = mean_error(totals)
        row = {"run": name, "sparsity of its linears": totals["sparsity"]}
        row |= {_OF_ALL: totals.get("sparsity_of_all_linears"), "bits": totals.get("bits")}
        rows.append(row | {error: mean, "seconds": totals.get("seconds")})
    forms = {"sparsity of its linears": ".2%", _OF_ALL: ".2%", "bits": ".3f", "seconds": ".1f"}
    forms |= dict.fromkeys(_DEFINITIONS, ".3%")
    table = table_of("Runs", rows, forms, best=dict.fromkeys(_DEFINITIONS, "lowest"))
    title = "Runs beside each other"
    charts = _error_charts(
        {
            f"{name} ({len(runs)} seeds)" if len(runs) > 1 else name: [*runs.values()]
            for name, runs in zip(names, lines.values(), strict=True)
        }
    )
    return Section(title, parts=(table, *charts))


def _named(records: Mapping[str, LinearsRecord]) -> dict[str, LinearsRecord]:
    """Runs by the shortest name that tells them apart.

    It is the method, what was done, the model as well, or the folder.

    Args:
        records: Folder of a run -> its record.
    """
    runs = records.values()
    namings = (
        [record.what for record in runs],
        [_work(record) for record in runs],
        [f"{source_name(record)}: {_work(record)}" for record in runs],
        [*short_names(records).values()],
    )
    names = next(naming for naming in namings if len({*naming}) == len(records))
    return dict(zip(names, runs, strict=True))


def _work(manifest: LinearsRecord) -> str:
    """What a run did, in words."""
    if isinstance(manifest, Manifest):
        return f"{manifest.what}, {manifest.shape}"
    by_bits = isinstance(manifest, CompressionRecord) and manifest.recipe.bits
    return f"{manifest.what} per weight" if by_bits else manifest.what


def _error_charts(records: Mapping[str, Sequence[LinearsRecord]]) -> list[Lines]:
    """The mean error of each block, where it was measured: a chart for each kind of error.

    Args:
        records: Name of a line -> its runs, which differ in their seed.
    """
    charts: dict[str, dict[str, dict[int, float]]] = {}
    for name, runs in records.items():
        error, _ = mean_error(runs[0].all_totals())
        measured = [
            of_run for run in runs for of_run in _by_block(run, lambda linear: "", "error").values()
        ]
        if measured:
            charts.setdefault(error, {})[name] = {
                number: fmean(of_run[number] for of_run in measured if number in of_run)
                for number in measured[0]
            }
    return [
        lines_over_blocks(f"Mean {error} by block", error, lines, ".3%")
        for error, lines in charts.items()
    ]


def _by_block(
    record: LinearsRecord, line_of: Callable[[str], str], figure: Literal["error", "sparsity"]
) -> dict[str, dict[int, float]]:
    """Name of a line -> number of a block -> mean of a figure over the linears that have it.

    Args:
        record: The record of the run.
        line_of: Name of a linear -> the line that it belongs to.
        figure: An attribute of `LinearRecord`.
    """
    lines: dict[str, dict[int, list[float]]] = {}
    for number, block in enumerate(record.blocks):
        for name, linear in block.linears.items():
            if (value := getattr(linear, figure)) is not None:
                lines.setdefault(line_of(name), {}).setdefault(number, []).append(value)
    return {
        line: {number: fmean(figures) for number, figures in blocks.items()}
        for line, blocks in lines.items()
    }


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
            (0.0,) * len(values),
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
    sparsity = f"{totals['sparsity']:.2%}"
    if isinstance(manifest, Manifest) and manifest.misses(totals["sparsity"]):
        sparsity += f" (asked for: {manifest.asked_sparsity:.2%})"
    of_all = totals.get("sparsity_of_all_linears")
    all_linears = [] if of_all is None else [(_OF_ALL, f"{of_all:.2%}")]
    if not isinstance(manifest, CompressionRecord):
        reached = ("sparsity of the pruned linears", sparsity)
        return [reached, *all_linears, ("weights removed", counts)]
    mean_bits, size, recipe = totals.get("bits"), manifest.size, manifest.recipe
    bits = "not known yet" if mean_bits is None else f"{mean_bits:.3f}"
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
        ("zeros of the rounded linears", f"{sparsity}: {counts}"),
        *all_linears,
    ]


def _by_linear(manifest: LinearsRecord, error: str) -> Table:
    timed = "seconds" in manifest.all_totals()
    rows = [
        {
            "block": number,
            "linear": f"{block.name}.{name}",
            "out × in": " × ".join(map(str, x.shape)),
            "zeros": x.zeros,
            "sparsity reached": x.sparsity,
            "bits": x.bits,
            error: x.error,
            "seconds": x.seconds if timed else None,
            "notes": "; ".join(f"{key}: {value}" for key, value in x.notes.items()) or None,
        }
        for number, block in enumerate(manifest.blocks)
        for name, x in block.linears.items()
    ]
    forms = {"block": "d", "zeros": ",d", "sparsity reached": ".2%", "bits": ".3f", error: ".3%"}
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
        data=plain_rows([{"model": source_name(record)} | totals]),
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
