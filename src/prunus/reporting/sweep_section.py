"""A sweep as a section: quality by method and sparsity, then the cells, protocol and machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prunus.reporting.evaluation_sections import form_of
from prunus.reporting.quality import FORMS, decode_speed, score_figures
from prunus.reporting.sweep_quality import quality_parts, text_name
from prunus.runs.document import Column, Facts, Measured, Section, Table, items_of, table_of
from prunus.runs.record import bos_words

if TYPE_CHECKING:
    from prunus.sweeping.results import CellResult, ModelResult, SweepResults

__all__ = ["check_section", "sweep_section"]

_WHAT_WOULD_HAPPEN = {
    "waiting": "would run",
    "running": "would go on",
    "failed": "failed, would run again",
    "done": "done",
}


def sweep_section(results: SweepResults, speeds: Mapping[str, float] | None = None) -> Section:
    """The section of a sweep, finished or not.

    Args:
        results: what the sweep has found so far.
        speeds: model as it was given to `prunus bench` -> tokens per second, for models that lie
            in the folders of cells.
    """
    speeds = speeds or {}
    parts: list[Any] = [_headline(results)]
    details: list[Any] = []
    several = len(results.models) > 1
    for label, model in results.models.items():
        own = [cell for cell in results.cells if cell.model == label]
        sizes = {
            cell.name: _sizes(cell, decode_speed(speeds, cell.name, cell.name)) for cell in own
        }
        dense = _sizes(model, decode_speed(speeds, model.path, label))
        for text in results.scoring["texts"]:
            shown, folded = quality_parts(
                f"{text_name(text)}, {label}" if several else text_name(text),
                {cell.name: (cell, _scores(cell, text) | sizes[cell.name]) for cell in own},
                _scores(model, text) | dense,
            )
            parts += shown
            details += folded
    if results.scoring.get("tasks"):
        parts.append(_tasks(results))
    failed = tuple((cell.name, cell.error) for cell in results.cells if cell.error)
    failed += tuple(
        (f"{label}, dense", model.error) for label, model in results.models.items() if model.error
    )
    if failed:
        parts.append(Table("What failed", (Column("cell"), Column("reason")), failed))
    details = [_cells(results, speeds), *details, *_circumstances(results)]
    lead = " ".join(results.description.split())
    return Section(results.title, lead, tuple(parts), tuple(details))


def check_section(results: SweepResults) -> Section:
    """The section of a sweep that was only checked: every cell, and what would become of it.

    Args:
        results: of an earlier run of the sweep, if there was one, with all cells of this one.
    """
    rows = [
        (f"{label}-dense", label, _WHAT_WOULD_HAPPEN[_dense_state(model, results)])
        for label, model in results.models.items()
    ]
    rows += [(cell.name, cell.model, _WHAT_WOULD_HAPPEN[cell.state]) for cell in results.cells]
    columns = (Column("cell"), Column("model"), Column("state"))
    lead = "Everything was checked. Nothing was run or written."
    return Section(results.title, lead, (Table("Cells", columns, tuple(rows)),))


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


def _scores(found: CellResult | ModelResult, text: str) -> dict[str, Any]:
    """The figures of a cell or a dense model on one text."""
    gap = getattr(found, "residual_gap", {}).get(text)
    return score_figures(found.scores.get(text)) | {"residual gap": gap}


def _sizes(found: CellResult | ModelResult, speed: float | None) -> dict[str, Any]:
    nbytes, bits = found.size.smallest if found.size is not None else (None, None)
    return {
        "file, GB": None if nbytes is None else nbytes / 1e9,
        "bits per weight": bits,
        "decoded tokens/s": speed,
    }


def _tasks(results: SweepResults) -> Table:
    """Accuracy of each task, or all its metrics if it has no accuracy."""
    models = {f"{label}-dense": model.tasks for label, model in results.models.items()}
    forms: dict[str, str] = {}
    rows = []
    for name, tasks in (models | {cell.name: cell.tasks for cell in results.cells}).items():
        row: dict[str, Any] = {"cell": name}
        for task, metrics in tasks.items():
            for metric, figure in metrics.items():
                if figure.value is not None and (metric == "acc" or "acc" not in metrics):
                    title = task if metric == "acc" else f"{task}, {metric}"
                    row[title] = Measured(figure.value, figure.stderr)
                    forms[title] = form_of(metric)
        rows.append(row)
    note = "Accuracy unless another metric is named; ± one standard error."
    return table_of("Tasks", rows, forms, note)


def _cells(results: SweepResults, speeds: Mapping[str, float]) -> Table:
    """One row per dense model and per cell."""
    texts = results.scoring["texts"]

    def on_all_texts(found: CellResult | ModelResult) -> dict[str, Any]:
        return {
            f"{title}, {text_name(text)}": figure
            for text in texts
            for title, figure in _scores(found, text).items()
        }

    rows = [
        {"cell": f"{label}-dense", "sparsity reached": 0.0, "error": None}
        | on_all_texts(model)
        | _sizes(model, decode_speed(speeds, model.path, label))
        | {"state": _dense_state(model, results)}
        for label, model in results.models.items()
    ]
    for cell in results.cells:
        pruning, recovered = cell.pruning, cell.recovered or {}
        rows.append(
            {
                "cell": cell.name,
                "sparsity reached": pruning.sparsity if pruning else recovered.get("sparsity"),
                "error": _error_text(cell),
                **on_all_texts(cell),
                **_sizes(cell, decode_speed(speeds, cell.name, cell.name)),
                "pruning seconds": pruning.seconds if pruning else None,
                "recovery seconds": recovered.get("seconds"),
                "state": cell.state,
            }
        )
    forms = FORMS | {
        f"{title}, {text_name(text)}": form for title, form in FORMS.items() for text in texts
    }
    forms |= {"sparsity reached": ".2%", "pruning seconds": ",.1f", "recovery seconds": ",.1f"}
    note = (
        "Error: mean relative output error, or mean removed energy (E), which assumes uncorrelated "
        "inputs. KL divergence: from the dense model, in nats per token; ± one standard error over "
        "windows. File: as prunus pack would write it without loss, with the bits per weight of "
        "its linears in the blocks; as stored where it packs nothing."
    )
    return table_of("Cells", rows, forms, note)


def _dense_state(model: ModelResult, results: SweepResults) -> str:
    """The state of the dense model of a sweep: it is done when every text and task is scored."""
    if model.error:
        return "failed"
    tasks_done = bool(model.tasks) or not results.scoring.get("tasks")
    texts_done = set(results.scoring["texts"]) <= set(model.scores)
    return "done" if tasks_done and texts_done else "waiting"


def _error_text(cell: CellResult) -> str | None:
    if cell.pruning is None:
        return None
    if cell.pruning.mean_relative_output_error is not None:
        return f"{cell.pruning.mean_relative_output_error:.2%}"
    energy = cell.pruning.mean_removed_energy
    return f"{energy:.2%} (E)" if energy is not None else None


def _circumstances(results: SweepResults) -> list[Facts]:
    protocol = {"command": f"prunus sweep {results.file} OUT"}
    for text in results.scoring["texts"]:
        score = next((m.scores[text] for m in results.models.values() if text in m.scores), None)
        if score is not None:
            protocol[f"scored on {text_name(text)}"] = f"{score.source}; {score.protocol}"
    for windows in results.calibration:
        name = f"calibration, {windows.samples} × {windows.seqlen}, seed {windows.seed}"
        if len(results.models) > 1:
            name += f", {windows.model}"
        protocol[name] = f"{windows.source}, {bos_words(windows.used_bos)}"
    return [
        Facts("Protocol", tuple(protocol.items())),
        Facts("Machine", items_of(results.hardware | results.versions)),
    ]
