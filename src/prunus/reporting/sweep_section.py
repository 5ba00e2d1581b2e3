"""A sweep as a section: quality by method and sparsity, then the cells, protocol and machine.

Quality on one text is shown as means over seeds. Rows are methods. Columns are the first of
sparsity, number of windows and tokens per window that varies among the cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prunus.engine.document import (
    Column,
    Facts,
    Lines,
    Part,
    Section,
    Series,
    Table,
    items_of,
    short_names,
    table_of,
)
from prunus.engine.record import bos_words
from prunus.evaluation.records import FORMS
from prunus.reporting.evaluation_sections import (
    LOG_FROM,
    Point,
    decode_speed,
    form_of,
    plain,
    quality_charts,
)

if TYPE_CHECKING:
    from prunus.pruning.recipe import Recipe
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


def sweep_section(results: SweepResults, speeds: Mapping[str, float] | None = None) -> Section:
    """The section of a sweep, finished or not.

    Args:
        results: What the sweep has measured so far.
        speeds: Model, as it was given to `prunus bench` -> tokens per second, for models that lie
            in the folders of cells; None without a benchmark.
    """
    measured = {
        name: speed
        for name, label, _ in results.every_model()
        if (speed := _speed(results, speeds or {}, name, label)) is not None
    }
    parts: list[Any] = [_headline(results)]
    details: list[Any] = [results.table(measured)]
    texts = short_names(results.scoring["texts"])
    for label in results.models:
        for text, where in texts.items():
            rows = {
                name: scored.figures(text) | {"decoded tokens/s": measured.get(name)}
                for name, _, scored in results.every_model()
            }
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
        (name, label, _WHAT_WOULD_HAPPEN[results.state_of(cell)])
        for name, label, cell in results.every_model()
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
                row[column], forms[column] = figure, form_of(metric)
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


def _quality_parts(
    where: str, cells: Mapping[str, tuple[CellResult, Mapping[str, Any]]], dense: Mapping[str, Any]
) -> tuple[list[Part], list[Part]]:
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
    name_of = _row_names([cell for cell, _ in cells.values()], axis)
    groups: dict[str, dict[Any, list[Mapping[str, Any]]]] = {}
    for name, (cell, figures) in cells.items():
        groups.setdefault(name_of[name], {}).setdefault(value_of(cell.recipe), []).append(figures)
    seeds = len({recipe.seed for recipe in recipes})

    def table(figure: str) -> Table:
        rows = [
            (name, *(_mean(figure, row.get(top, [])) for top in tops))
            for name, row in groups.items()
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
    for name, row in groups.items():
        for top, seed_figures in row.items():
            means = {figure: _mean(figure, seed_figures) for figure in FORMS}
            points.append(Point(name, f"{name}, {_title(axis, top)}", means))
    level = dense.get("perplexity")
    chart = _chart(f"Perplexity on {where} by {axis}", axis, tops, groups, level)
    shown: list[Part] = [table("perplexity"), *(table(x) for x in other_figures[:1])]
    shown += [*quality_charts(where, points, level), *([chart] if chart is not None else [])]
    return shown, [table(figure) for figure in other_figures[1:]]


def _chart(
    title: str,
    axis: str,
    tops: Sequence[Any],
    groups: Mapping[str, Mapping[Any, list[Mapping[str, Any]]]],
    level: float | None,
) -> Lines | None:
    """Perplexity over at least three numbers; patterns and fewer numbers are in the table alone."""
    if len(tops) < 3 or not all(not isinstance(top, str) or top.endswith("%") for top in tops):
        return None
    series = []
    for name, row in groups.items():
        points = [
            (top, mean, [figures["perplexity"] for figures in row[top]])
            for top in tops
            if top in row and (mean := _mean("perplexity", row[top])) is not None
        ]
        hover = tuple(
            f"{name}, {_title(axis, top)}: {mean:,.3f}"
            + (
                f" (mean of {len(values)} seeds, {min(values):,.3f} to {max(values):,.3f})"
                if len(values) > 1
                else ""
            )
            for top, mean, values in points
        )
        if points:
            x = tuple(_number(top) for top, _, _ in points)
            series.append(Series(name, x, tuple(mean for _, mean, _ in points), hover))
    values = [y for line in series for y in line.y] + ([level] if level is not None else [])
    if not series:
        return None
    xs = [_number(top) for top in tops]
    return Lines(
        title,
        f"{axis} (%)" if axis == "sparsity" else axis,
        "perplexity",
        tuple(series),
        level=("dense", level) if level is not None else None,
        log_x=min(xs) > 0 and max(xs) / min(xs) >= 16,
        log_y=max(values) / min(values) >= LOG_FROM,
    )


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


def _number(top: Any) -> float:
    return float(top.removesuffix("%")) if isinstance(top, str) else float(top)


def _mean(figure: str, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean over seeds, or None if a value is missing: all means are over the same seeds."""
    values = [value for row in rows if (value := plain(row.get(figure))) is not None]
    return sum(values) / len(values) if values and len(values) == len(rows) else None
