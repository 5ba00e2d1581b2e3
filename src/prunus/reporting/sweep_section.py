"""A sweep as a section: quality by method and sparsity, then the cells, protocol and machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prunus.reporting.evaluation_sections import form_of
from prunus.reporting.quality import decode_speed
from prunus.reporting.sweep_quality import quality_parts
from prunus.runs.document import Column, Facts, Section, Table, items_of, short_names, table_of
from prunus.runs.record import bos_words

if TYPE_CHECKING:
    from prunus.sweeping.results import SweepResults

_WHAT_WOULD_HAPPEN = {
    "waiting": "would run",
    "running": "would continue",
    "failed": "failed, would run again",
    "done": "done",
}


def sweep_section(results: SweepResults, speeds: Mapping[str, float] | None = None) -> Section:
    """The section of a sweep, finished or not.

    Args:
        speeds: model as it was given to `prunus bench` -> tokens per second, for models that lie
            in the folders of cells.
    """
    measured = {
        name: speed
        for name, label, _ in results.every_model()
        if (speed := _speed(results, speeds or {}, name, label)) is not None
    }
    parts: list[Any] = [_headline(results)]
    details: list[Any] = [results.table(measured)]
    texts = short_names(results.scoring["texts"])
    for label, model in results.models.items():
        for text, where in texts.items():

            def figures(name: str, found: Any, text: str = text) -> dict[str, Any]:
                return found.figures(text) | {"decoded tokens/s": measured.get(name)}

            own = [cell for cell in results.cells if cell.model == label]
            shown, folded = quality_parts(
                f"{where}, {label}" if len(results.models) > 1 else where,
                {cell.name: (cell, figures(cell.name, cell)) for cell in own},
                figures(f"{label}-dense", model),
            )
            parts += shown
            details += folded
    if results.scoring.get("tasks"):
        parts.append(_tasks(results))
    failed = tuple((name, x.error) for name, _, x in results.every_model() if x.error)
    if failed:
        parts.append(Table("What failed", (Column("model"), Column("reason")), failed))
    details += _circumstances(results, texts)
    lead = " ".join(results.description.split())
    return Section(results.title, lead, tuple(parts), tuple(details))


def check_section(results: SweepResults) -> Section:
    """The section of a sweep that was only checked: every cell, and what would become of it.

    Args:
        results: of an earlier run of the sweep, if there was one, with all cells of this one.
    """
    rows = tuple(
        (name, label, _WHAT_WOULD_HAPPEN[results.state_of(found)])
        for name, label, found in results.every_model()
    )
    columns = (Column("cell"), Column("model"), Column("state"))
    lead = "Everything was checked. Nothing was run or written."
    return Section(results.title, lead, (Table("Cells", columns, rows),))


def _speed(
    results: SweepResults, speeds: Mapping[str, float], name: str, label: str
) -> float | None:
    if name == f"{label}-dense":
        return decode_speed(speeds, results.models[label].path, label)
    return decode_speed(speeds, name, name)


def _headline(results: SweepResults) -> Facts:
    states = [cell.state for cell in results.cells]
    seconds = sum(cell.pruning["seconds"] for cell in results.cells if cell.pruning)
    items = {"cells done": f"{states.count('done')} of {len(states)}"}
    if "failed" in states:
        items["cells failed"] = str(states.count("failed"))
    texts = short_names(results.scoring["texts"])
    for label, model in results.models.items():
        for text, score in model.scores.items():
            name = f"dense perplexity, {texts.get(text, text)}"
            name += f", {label}" if len(results.models) > 1 else ""
            items[name] = f"{score.perplexity:.3f}"
    items["pruning in all"] = f"{seconds / 60:.1f} min"
    return Facts("Headline", tuple(items.items()), headline=True)


def _tasks(results: SweepResults) -> Table:
    """Accuracy of each task, or all its metrics if it has no accuracy."""
    rows, forms = [], {}
    for name, _, found in results.every_model():
        row: dict[str, Any] = {"model": name}
        for title, figure in found.task_figures().items():
            task, _, metric = title.rpartition(", ")
            if metric == "acc" or "acc" not in found.tasks[task]:
                own = task if metric == "acc" else title
                row[own], forms[own] = figure, form_of(metric)
        rows.append(row)
    note = "Accuracy unless another metric is named; ± one standard error."
    return table_of("Tasks", rows, forms, note)


def _circumstances(results: SweepResults, texts: Mapping[str, str]) -> list[Facts]:
    protocol = {"command": f"prunus sweep {results.file} OUT"}
    for text, name in texts.items():
        score = next((m.scores[text] for m in results.models.values() if text in m.scores), None)
        if score is not None:
            protocol[f"scored on {name}"] = f"{score.source}; {score.protocol}"
    for windows in results.calibration:
        name = "calibration, {samples} × {seqlen}, seed {seed}".format(**windows.options)
        if len(results.models) > 1:
            name += f", {windows.model}"
        protocol[name] = f"{windows.source}, {bos_words(windows.used_bos)}"
    return [
        Facts("Protocol", tuple(protocol.items())),
        Facts("Machine", items_of(results.hardware | results.versions)),
    ]
