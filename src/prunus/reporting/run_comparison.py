"""Two or more pruning runs compared: what differs between them, and how large errors are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prunus.pruning.manifest import mean_error
from prunus.reporting.run_sections import block_errors, lines_over_blocks
from prunus.runs.document import Column, Part, Section, Table, table_of

if TYPE_CHECKING:
    from prunus.pruning.manifest import PruningRecord


def comparison_section(runs: Mapping[str, PruningRecord]) -> Section:
    """The section that compares runs.

    Args:
        runs: name of each run, as the reader knows it -> its manifest; at least two.
    """
    errors = {name: found for name, run in runs.items() if (found := block_errors(run))}
    chart = [lines_over_blocks("Mean error by block", "mean error", errors, ".3%")]
    charts: tuple[Part, ...] = tuple(chart if errors else [])
    parts: tuple[Part, ...] = (_totals(runs), _differences(runs), *charts, _errors_by_kind(runs))
    return Section("Runs compared", parts=parts)


def _totals(runs: Mapping[str, PruningRecord]) -> Table:
    rows = []
    for name, run in runs.items():
        totals = run.all_totals()
        memory = totals.get("peak_memory_bytes")
        rows.append(
            {
                "run": name,
                "method": run.recipe.method,
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


def _errors_by_kind(runs: Mapping[str, PruningRecord]) -> Table:
    kinds: dict[str, list[float | None]] = {}
    for place, run in enumerate(runs.values()):
        for kind, records in run.linears_by_kind().items():
            errors = [record.error for record in records if record.error is not None]
            row = kinds.setdefault(kind, [None] * len(runs))
            row[place] = sum(errors) / len(errors) if errors else None
    columns = (Column("linear"), *(Column(name, ".3%") for name in runs))
    rows = tuple((kind, *errors) for kind, errors in kinds.items())
    return Table("Mean error by kind of linear", columns, rows)
