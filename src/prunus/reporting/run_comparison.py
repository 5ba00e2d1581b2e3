"""Two or more pruning runs side by side: what differs between them, and where their errors lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prunus.reporting.document import Column, Lines, Section, Series, Table, text_of
from prunus.reporting.run_sections import error_of

if TYPE_CHECKING:
    from prunus.pruning.manifest import Manifest
    from prunus.pruning.records import BlockRecord

__all__ = ["comparison_section"]


def comparison_section(runs: Mapping[str, Manifest]) -> Section:
    """The section that compares runs.

    Args:
        runs: name of each run, as the reader knows it -> its manifest; at least two.
    """
    parts: list[Any] = [_totals(runs), _differences(runs), _errors_by_kind(runs)]
    if any(_block_errors(run) for run in runs.values()):
        parts.append(_errors_by_block(runs))
    return Section("Runs side by side", parts=tuple(parts))


def _totals(runs: Mapping[str, Manifest]) -> Table:
    rows: list[tuple[Any, ...]] = []
    for name, run in runs.items():
        totals = run.all_totals()
        error = totals["mean_relative_output_error"]
        memory = totals.get("peak_memory_bytes")
        rows.append(
            (
                name,
                run.recipe.method,
                totals["sparsity"],
                totals.get("bits"),
                totals["mean_removed_energy"] if error is None else error,
                totals["seconds"],
                None if memory is None else memory / 1e9,
            )
        )
    columns = [
        Column("run"),
        Column("method"),
        Column("sparsity", ".2%"),
        Column("bits", ".3f"),
        Column("mean error", ".3%"),
        Column("seconds", ".1f"),
        Column("peak memory, GB", ".2f"),
    ]
    if all(row[3] is None for row in rows):
        del columns[3]
        rows = [(*row[:3], *row[4:]) for row in rows]
    note = (
        "The error is the relative output error, or the removed energy where a method needs no "
        "Gram matrix; compare it between runs of one kind alone."
    )
    return Table("Totals", tuple(columns), tuple(rows), note)


def _differences(runs: Mapping[str, Manifest]) -> Table:
    """The fields of recipes and inputs in which the runs differ; one column per run."""
    fields = [
        {"model": run.source}
        | run.recipe.model_dump()
        | {
            "calibration text": run.inputs.calibration,
            "calibration sha256": run.inputs.calibration_sha256[:12],
            "computed in": run.inputs.dtype,
            "device": run.inputs.device,
        }
        for run in runs.values()
    ]
    names = list(dict.fromkeys(name for one in fields for name in one))
    rows = [
        (name, *(_text(one.get(name)) for one in fields))
        for name in names
        if len({str(one.get(name)) for one in fields}) > 1
    ]
    columns = (Column("field"), *(Column(name) for name in runs))
    note = "" if rows else "The runs have the same recipe and the same inputs."
    return Table("What differs", columns, tuple(rows), note)


def _text(value: Any) -> str | None:
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or None
    return None if value is None else str(value)


def _errors_by_kind(runs: Mapping[str, Manifest]) -> Table:
    found = {name: run.linears_by_kind() for name, run in runs.items()}
    kinds = dict.fromkeys(kind for kinds in found.values() for kind in kinds)
    rows = []
    for kind in kinds:
        row: list[Any] = [kind]
        for each in found.values():
            errors = [e for record in each.get(kind, ()) if (e := error_of(record)) is not None]
            row.append(sum(errors) / len(errors) if errors else None)
        rows.append(tuple(row))
    columns = (Column("linear"), *(Column(name, ".3%") for name in runs))
    return Table("Mean error by kind of linear", columns, tuple(rows))


def _block_errors(run: Manifest) -> list[tuple[int, float]]:
    """(block, mean error of its linears) for all blocks whose error was measured."""

    def mean(block: BlockRecord) -> float | None:
        errors = [e for record in block.linears.values() if (e := error_of(record)) is not None]
        return sum(errors) / len(errors) if errors else None

    return [(i, e) for i, block in enumerate(run.blocks) if (e := mean(block)) is not None]


def _errors_by_block(runs: Mapping[str, Manifest]) -> Lines:
    series = []
    for name, run in runs.items():
        if errors := _block_errors(run):
            blocks, values = zip(*errors, strict=True)
            hover = tuple(
                f"{name}, block {block}: {text_of(value, '.3%')}" for block, value in errors
            )
            series.append(Series(name, blocks, tuple(100 * value for value in values), hover))
    return Lines("Mean error by block", "block", "mean error, %", tuple(series), round_ticks=True)
