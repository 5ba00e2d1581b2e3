"""A sweep as a section: quality by method and sparsity, then the cells, protocol and machine.

Quality on one text is shown as means over seeds. Rows are methods. Columns are the first of
sparsity, number of windows and tokens per window that varies among the cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prunus.engine.document import (
    Column,
    DocumentPart,
    Facts,
    Lines,
    Section,
    Table,
    items_of,
    short_names,
    table_of,
)
from prunus.evaluation.eval_records import FORMS
from prunus.pruning.recipe import Recipe
from prunus.reporting.evaluation_sections import (
    Point,
    form_of,
    perplexity_chart,
    plain,
    positions_of,
    quality_charts,
)
from prunus.sweeping.results import CellResult, SweepResults

# State of a cell -> what a run of the sweep would do with it.
_WHAT_WOULD_HAPPEN = {
    "waiting": "would run",
    "running": "would continue",
    "failed": "failed, would run again",
    "done": "done",
}
#: Title -> value in a recipe, for the columns of a table. They are the chart's x axis as well.
_AXES: dict[str, Callable[[Recipe], Any]] = {
    "sparsity": lambda recipe: _shape(recipe),  # noqa: PLW0108
    "calibration windows": lambda recipe: recipe.samples,
    "tokens per window": lambda recipe: recipe.seqlen,
}
#: Fields of a recipe that are never part of a row's name: the axes and the method name them.
_NOT_IN_ROWS = {"method", "sparsity", "pattern", "seed"}
# Figure -> the note below its table.
_NOTES = {
    "perplexity": "Lower is better.",
    "KL divergence": "From the dense model, in nats per token; lower is better.",
    "residual gap": (
        "(perplexity − dense) / (perplexity of Wanda − dense) under the same conditions: Wanda is "
        "1, lossless is 0. Left out where Wanda loses less than 1 % of the dense perplexity."
    ),
}


def sweep_section(results: SweepResults) -> Section:
    """The section of a sweep, finished or not.

    Args:
        results: What the sweep has measured so far.
    """
    parts: list[Any] = [_headline(results)]
    details: list[Any] = [results.table()]
    texts = short_names(results.scoring["texts"])
    for label in results.models:
        for text, where in texts.items():
            rows = {name: scored.figures(text) for name, _, scored in results.every_model()}
            model_cells = [cell for cell in results.cells if cell.model == label]
            shown, folded = _quality_parts(
                f"{where}, {label}" if len(results.models) > 1 else where,
                {cell.name: (cell, rows[cell.name]) for cell in model_cells},
                rows[f"{label}-dense"],
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
        results: The results of an earlier run of the sweep, with all cells of this one.
    """
    rows = tuple(
        (name, label, _WHAT_WOULD_HAPPEN[cell.state]) for name, label, cell in results.every_model()
    )
    columns = (Column("cell"), Column("model"), Column("state"))
    lead = "Everything was checked. Nothing was run or written."
    return Section(results.title, lead, (Table("Cells", columns, rows),))


def _headline(results: SweepResults) -> Facts:
    states = [cell.state for cell in results.cells]
    seconds = sum(cell.pruning["block_seconds"] for cell in results.cells if cell.pruning)
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
    for name, _, scored in results.every_model():
        row: dict[str, Any] = {"model": name}
        for title, figure in scored.task_figures().items():
            task, _, metric = title.rpartition(", ")
            if metric == "acc" or "acc" not in scored.tasks[task]:
                column = task if metric == "acc" else title
                row[column] = figure
                forms[column] = form_of(metric)
        rows.append(row)
    note = "Accuracy unless another metric is named; ± one standard error."
    return table_of("Tasks", rows, forms, note)


def _circumstances(results: SweepResults, texts: Mapping[str, str]) -> list[Facts]:
    protocol = {"command": f"prunus sweep {results.file} OUT"}
    for text, name in texts.items():
        score = next((m.scores[text] for m in results.models.values() if text in m.scores), None)
        if score is not None:
            protocol[f"scored on {name}"] = f"{score.source}; {score.protocol}"
    protocol |= _calibrations(results)
    return [
        Facts("Protocol", tuple(protocol.items())),
        Facts("Machine", items_of(results.hardware | results.versions)),
    ]


def _calibrations(results: SweepResults) -> dict[str, str]:
    """What cells ask of their calibration windows -> where the windows come from.

    Each cell draws its own. If cells that ask for the same have got different ones, because a text
    has changed in between, all are named with their hashes.
    """
    sources: dict[str, dict[str, str]] = {}
    for cell in results.cells:
        if cell.pruning is not None and "calibration" in cell.pruning:
            recipe = cell.recipe
            name = f"calibration on {recipe.calibration}, {recipe.samples} × {recipe.seqlen}"
            name += f", seed {recipe.seed}, BOS {recipe.bos}, {cell.model}"
            by_hash = sources.setdefault(name, {})
            by_hash[cell.pruning["calibration_sha256"]] = cell.pruning["calibration"]
    return {
        name: "; in other cells ".join(f"{x} (sha256 {sha[:12]})" for sha, x in by_hash.items())
        for name, by_hash in sources.items()
    }


def _quality_parts(
    where: str, cells: Mapping[str, tuple[CellResult, Mapping[str, Any]]], dense: Mapping[str, Any]
) -> tuple[list[DocumentPart], list[DocumentPart]]:
    """What the report shows of a model and a text at once, and what it folds away.

    Args:
        where: Name of the text, and of the model if there are several.
        cells: Name of a cell -> the cell, and its figures on the text.
        dense: The figures of the dense model.
    """
    recipes = [cell.recipe for cell, _ in cells.values()]
    axis = next((name for name, f in _AXES.items() if len(set(map(f, recipes))) > 1), "sparsity")
    value_of = _AXES[axis]
    tops = list(dict.fromkeys(map(value_of, recipes)))
    row_names = _row_names([cell for cell, _ in cells.values()], axis)
    # Row and column -> the figures of each seed.
    figures_by_seed: dict[tuple[str, Any], list[Mapping[str, Any]]] = {}
    for name, (cell, figures) in cells.items():
        key = (row_names[name], value_of(cell.recipe))
        figures_by_seed.setdefault(key, []).append(figures)
    means = {
        key: {figure: _mean(figure, rows) for figure in FORMS}
        for key, rows in figures_by_seed.items()
    }
    seeds = len({recipe.seed for recipe in recipes})

    def table(figure: str) -> Table:
        rows = [
            (name, *(means.get((name, top), {}).get(figure) for top in tops))
            for name in dict.fromkeys(name for name, _ in means)
        ]
        if figure == "perplexity":
            rows.insert(0, ("dense", *([dense.get(figure)] * len(tops))))
        note = (f"Means over {seeds} seeds. " if seeds > 1 else "") + _NOTES[figure]
        columns = (Column("method"), *(Column(_title(axis, top), FORMS[figure]) for top in tops))
        title = f"{figure[:1].upper()}{figure[1:]} on {where}"
        return Table(title, columns, tuple(rows), note)

    other_figures = [
        figure
        for figure in ("KL divergence", "residual gap")
        if any(figures.get(figure) is not None for _, figures in cells.values())
    ]
    points = [Point("dense", "dense", dense)]
    for (name, top), mean_figures in means.items():
        at = {_axis_title(axis): _number(top)}
        points.append(Point(name, f"{name}, {_title(axis, top)}", mean_figures | at))
    level = dense.get("perplexity")
    shown: list[DocumentPart] = [table("perplexity"), *(table(x) for x in other_figures[:1])]
    shown += quality_charts(where, points, level)
    shown += _axis_chart(where, axis, [_number(top) for top in tops], points, level)
    return shown, [table(figure) for figure in other_figures[1:]]


def _axis_chart(
    where: str,
    axis: str,
    numbers: Sequence[float | None],
    points: Sequence[Point],
    level: float | None,
) -> list[Lines]:
    """Perplexity over at least three numbers; patterns and fewer numbers are in the table alone."""
    xs = [number for number in numbers if number is not None]
    title = _axis_title(axis)
    positions = positions_of(points, title)
    if len(xs) < max(3, len(numbers)) or not positions:
        return []
    heading = f"Perplexity on {where} by {axis}"
    log_x = min(xs) > 0 and max(xs) / min(xs) >= 16
    return [perplexity_chart(heading, title, positions, level, log_x=log_x, round_ticks=False)]


def _row_names(cells: Sequence[CellResult], axis: str) -> dict[str, str]:
    """Cell -> name of its row: the method, and the options that vary among the method's cells."""
    names = {}
    hidden = _NOT_IN_ROWS | {
        "calibration windows": {"samples"},
        "tokens per window": {"seqlen"},
    }.get(axis, set())
    recipes = [cell.recipe for cell in cells]
    for cell in cells:
        equal = [other.model_dump() for other in recipes if other.method == cell.recipe.method]
        parts: list[str] = [cell.recipe.method]
        for key, value in cell.recipe.model_dump().items():
            if key not in hidden and any(other[key] != value for other in equal):
                parts.append(f"{key.replace('_', ' ')} {value}")
        if axis != "sparsity" and any(_shape(other) != _shape(cell.recipe) for other in recipes):
            parts.append(_shape(cell.recipe))
        if cell.recovery is not None:
            parts.append(f"recovered by {cell.recovery}")
        names[cell.name] = ", ".join(parts)
    return names


def _shape(recipe: Recipe) -> str:
    return recipe.pattern if recipe.n_of_m else f"{100 * recipe.sparsity:g}%"


def _title(axis: str, top: Any) -> str:
    if axis == "sparsity":
        return str(top)
    unit = "window" if "windows" in axis else "token"
    return f"{top:,} {unit}{'' if top == 1 else 's'}"


def _axis_title(axis: str) -> str:
    return f"{axis} (%)" if axis == "sparsity" else axis


def _number(top: Any) -> float | None:
    """Where a column of the table is on the x axis of the chart; None for an N:M pattern."""
    if isinstance(top, str) and not top.endswith("%"):
        return None
    return float(str(top).removesuffix("%"))


def _mean(figure: str, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean over seeds, or None if a value is missing: all means are over the same seeds."""
    values = [value for row in rows if (value := plain(row.get(figure))) is not None]
    return sum(values) / len(values) if values and len(values) == len(rows) else None
