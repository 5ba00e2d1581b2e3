"""A sweep as a section: quality by method and sparsity, the cells, protocol and machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prunus.reporting.document import Column, Facts, Measured, Section, Table
from prunus.reporting.evaluation_sections import form_of
from prunus.reporting.size_charts import decode_speed
from prunus.reporting.sweep_quality import quality_parts, text_name
from prunus.runs.record import bos_words

if TYPE_CHECKING:
    from prunus.sweeping.results import (
        CellResult,
        ModelResult,
        Score,
        Size,
        SweepResults,
        Tasks,
    )

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
    for label in results.models:
        cells = [cell for cell in results.cells if cell.model == label]
        for text in results.scoring["texts"]:
            parts += quality_parts(results, label, cells, text, speeds)
    if results.scoring.get("tasks"):
        parts.append(_tasks(results))
    parts.append(_cells(results, speeds))
    failed = tuple((cell.name, cell.error) for cell in results.cells if cell.error)
    failed += tuple(
        (f"{label}, dense", model.error) for label, model in results.models.items() if model.error
    )
    if failed:
        parts.append(Table("What failed", (Column("cell"), Column("reason")), failed))
    return Section(
        results.title, " ".join(results.description.split()), (*parts, *_circumstances(results))
    )


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


def _cells(results: SweepResults, speeds: Mapping[str, float]) -> Table:
    """One row per dense model and per cell. Columns of figures that nothing has are left out."""
    rows = [_dense_row(label, model, results, speeds) for label, model in results.models.items()]
    rows += [_cell_row(cell, results, speeds) for cell in results.cells]
    forms = {
        "sparsity reached": ".2%",
        "pruning seconds": ",.1f",
        "recovery seconds": ",.1f",
        "packed, GB": ",.3f",
        "bits per weight": ".2f",
        "decode, tokens/s": ",.1f",
        "perplexity": ",.3f",
        "residual gap": ".3f",
        "KL divergence": ",.4f",
        "KL 99.9 % quantile": ",.3f",
        "same top token": ".2%",
    }
    titles = dict.fromkeys(title for row in rows for title in row)
    always = {"cell", "error", "state", *(f"perplexity, {text_name(t)}" for t in _texts(results))}
    shown = [
        title
        for title in titles
        if title in always or any(row.get(title) is not None for row in rows)
    ]
    return Table(
        "Cells",
        tuple(
            Column(title, forms.get(title.partition(", ")[0], forms.get(title))) for title in shown
        ),
        tuple(tuple(row.get(title) for title in shown) for row in rows),
        "Error: mean relative output error, or mean removed energy (E), which assumes uncorrelated "
        "inputs. KL divergence: from the dense model, in nats per token; ± one standard error over "
        "windows. Packed: the file as prunus pack would write it without loss, and the bits per "
        "weight of its linears in the blocks; as stored where it packs nothing.",
        folded=True,
    )


def _texts(results: SweepResults) -> list[str]:
    return list(results.scoring["texts"])


def _dense_row(
    label: str, model: ModelResult, results: SweepResults, speeds: Mapping[str, float]
) -> dict[str, Any]:
    return {
        "cell": f"{label}-dense",
        "sparsity reached": 0.0,
        "error": None,
        **_scores(model.scores, _texts(results)),
        **_size(model.size, decode_speed(speeds, model.path, label)),
        "state": _dense_state(model, results),
    }


def _dense_state(model: ModelResult, results: SweepResults) -> str:
    """The state of the dense model of a sweep: it is done when every text and task is scored."""
    if model.error:
        return "failed"
    tasks_done = bool(model.tasks) or not results.scoring.get("tasks")
    return "done" if tasks_done and all(x in model.scores for x in _texts(results)) else "waiting"


def _cell_row(
    cell: CellResult, results: SweepResults, speeds: Mapping[str, float]
) -> dict[str, Any]:
    pruning, recovered = cell.pruning, cell.recovered or {}
    gaps = {f"residual gap, {text_name(t)}": cell.residual_gap.get(t) for t in _texts(results)}
    return {
        "cell": cell.name,
        "sparsity reached": pruning.sparsity if pruning else recovered.get("sparsity"),
        "error": _error_text(cell),
        **_scores(cell.scores, _texts(results)),
        **gaps,
        **_size(cell.size, decode_speed(speeds, cell.name, cell.name)),
        "pruning seconds": pruning.seconds if pruning else None,
        "recovery seconds": recovered.get("seconds"),
        "state": cell.state,
    }


def _scores(scores: Mapping[str, Score], texts: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts:
        score, name = scores.get(text), text_name(text)
        found[f"perplexity, {name}"] = score.perplexity if score is not None else None
        if score is not None and score.divergence is not None:
            kl = score.divergence
            found |= {
                f"KL divergence, {name}": Measured(kl.kl, kl.kl_stderr),
                f"KL 99.9 % quantile, {name}": kl.kl_q999,
                f"same top token, {name}": Measured(kl.same_top, kl.same_top_stderr),
            }
    return found


def _size(size: Size | None, speed: float | None) -> dict[str, Any]:
    nbytes, bits = size.smallest if size is not None else (None, None)
    return {
        "packed, GB": None if nbytes is None else nbytes / 1e9,
        "bits per weight": bits,
        "decode, tokens/s": speed,
    }


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
        protocol.append((name, f"{windows.source}, {bos_words(windows.used_bos)}"))
    machine = tuple(
        (key, str(value)) for key, value in (results.hardware | results.versions).items()
    )
    command = f"prunus sweep {results.file} OUT"
    return Facts("Protocol", (("command", command), *protocol)), Facts("Machine", machine)
