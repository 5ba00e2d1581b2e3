"""A sweep as a section: quality by method and sparsity, the cells, protocol and machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prunus.report.document import Column, Facts, Measured, Section, Table
from prunus.report.evaluation_sections import form_of
from prunus.report.sweep_quality import quality_parts, text_name

if TYPE_CHECKING:
    from prunus.sweep.results import CellResult, SweepResults, Tasks

__all__ = ["sweep_section"]


def sweep_section(results: SweepResults) -> Section:
    """The section of a sweep, finished or not."""
    parts: list[Any] = [_headline(results)]
    for label in results.models:
        cells = [cell for cell in results.cells if cell.model == label]
        for text in results.scoring["texts"]:
            parts += quality_parts(results, label, cells, text)
    if results.scoring.get("tasks"):
        parts.append(_tasks(results))
    parts.append(_cells(results))
    failed = tuple((cell.name, cell.error) for cell in results.cells if cell.error)
    failed += tuple(
        (f"{label}, dense", model.error) for label, model in results.models.items() if model.error
    )
    if failed:
        parts.append(Table("What failed", (Column("cell"), Column("reason")), failed))
    return Section(
        results.title, " ".join(results.description.split()), (*parts, *_circumstances(results))
    )


def _headline(results: SweepResults) -> Facts:
    done = sum(cell.state == "done" for cell in results.cells)
    failed = sum(cell.state == "failed" for cell in results.cells)
    seconds = sum(cell.pruning.seconds for cell in results.cells if cell.pruning)
    items = [("cells done", f"{done} of {len(results.cells)}")]
    if failed:
        items.append(("cells failed", str(failed)))
    for label, model in results.models.items():
        for text, score in model.scores.items():
            name = f"dense perplexity, {text_name(text)}"
            several = len(results.models) > 1
            figure = f"{score.perplexity:.3f}" if score.perplexity is not None else "infinite"
            items.append((f"{name}, {label}" if several else name, figure))
    items.append(("pruning in all", f"{seconds / 60:.1f} min"))
    return Facts("Headline", tuple(items), headline=True)


def _tasks(results: SweepResults) -> Table:
    """Accuracy of each task, or all its metrics if it has no accuracy."""
    rows = [(f"{label}-dense", model.tasks) for label, model in results.models.items()]
    rows += [(cell.name, cell.tasks) for cell in results.cells]
    found: dict[tuple[str, str], None] = {}
    for _, tasks in rows:
        for task, metrics in tasks.items():
            found |= dict.fromkeys(
                (task, metric) for metric in metrics if metric == "acc" or "acc" not in metrics
            )
    columns = [
        Column(task if metric == "acc" else f"{task}, {metric}", form_of(metric))
        for task, metric in found
    ]
    lines = tuple((name, *(_measured(tasks, *key) for key in found)) for name, tasks in rows)
    return Table(
        "Tasks",
        (Column("cell"), *columns),
        lines,
        "Accuracy unless another metric is named; ± one standard error.",
    )


def _measured(tasks: Tasks, task: str, metric: str) -> Measured | None:
    figure = tasks.get(task, {}).get(metric)
    return (
        Measured(figure.value, figure.stderr)
        if figure is not None and figure.value is not None
        else None
    )


def _cells(results: SweepResults) -> Table:
    texts = results.scoring["texts"]
    recovered = any(cell.recovery for cell in results.cells)
    columns = [
        Column("cell"),
        Column("sparsity reached", ".2%"),
        Column("error"),
        *(Column(f"perplexity, {text_name(text)}", ",.3f") for text in texts),
        *(Column(f"residual gap, {text_name(text)}", ".3f") for text in texts),
        Column("pruning seconds", ",.1f"),
        *([Column("recovery seconds", ",.1f")] if recovered else []),
        Column("state"),
    ]
    rows: list[tuple[Any, ...]] = []
    for label, model in results.models.items():
        scores = [model.scores[text].perplexity if text in model.scores else None for text in texts]
        rows.append(
            (
                f"{label}-dense",
                0.0,
                None,
                *scores,
                *[None] * len(texts),
                None,
                *([None] if recovered else []),
                "failed" if model.error else "done",
            )
        )
    for cell in results.cells:
        pruning = cell.pruning
        rows.append(
            (
                cell.name,
                pruning.sparsity if pruning else (cell.recovered or {}).get("sparsity"),
                _error_text(cell),
                *(cell.scores[text].perplexity if text in cell.scores else None for text in texts),
                *(cell.residual_gap.get(text) for text in texts),
                pruning.seconds if pruning else None,
                *([(cell.recovered or {}).get("seconds")] if recovered else []),
                cell.state,
            )
        )
    note = (
        "Error: mean relative output error, or mean removed energy (E), which assumes uncorrelated "
        "inputs."
    )
    return Table("Cells", tuple(columns), tuple(rows), note, folded=True)


def _error_text(cell: CellResult) -> str | None:
    if cell.pruning is None:
        return None
    if cell.pruning.mean_relative_output_error is not None:
        return f"{cell.pruning.mean_relative_output_error:.2%}"
    energy = cell.pruning.mean_removed_energy
    return f"{energy:.2%} (E)" if energy is not None else None


def _circumstances(results: SweepResults) -> tuple[Facts, ...]:
    protocol = []
    for text in results.scoring["texts"]:
        score = next((m.scores[text] for m in results.models.values() if text in m.scores), None)
        if score is not None:
            protocol.append((f"scored on {text_name(text)}", f"{score.source}; {score.protocol}"))
    for windows in results.calibration:
        name = f"calibration, {windows.samples} × {windows.seqlen}, seed {windows.seed}"
        if len(results.models) > 1:
            name += f", {windows.model}"
        protocol.append((name, windows.source))
    machine = tuple(
        (key, str(value)) for key, value in (results.hardware | results.versions).items()
    )
    command = f"prunus sweep {results.file} OUT"
    return Facts("Protocol", (("command", command), *protocol)), Facts("Machine", machine)
