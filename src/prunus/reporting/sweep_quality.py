"""Quality of a sweep's cells: tables and a chart for one model and one scoring text.

Rows are methods. Columns are the first of sparsity, number of windows and tokens per window that
varies among the cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunus.reporting.document import Column, Lines, Series, Table
from prunus.reporting.size_charts import LOG_FROM, Result, decode_speed, size_charts

if TYPE_CHECKING:
    from prunus.pruning.recipe import Recipe
    from prunus.sweeping.results import CellResult, SweepResults

__all__ = ["quality_parts", "text_name"]

#: Title and value of the columns of a table, which are the x axis of the chart as well.
_AXES: dict[str, Callable[[Recipe], Any]] = {
    "sparsity": lambda recipe: _shape(recipe),  # noqa: PLW0108
    "calibration windows": lambda recipe: recipe.samples,
    "tokens per window": lambda recipe: recipe.seqlen,
}
#: Fields of a recipe that never stand in the name of a row: the axes and the method name them.
_NOT_IN_ROWS = {"method", "sparsity", "pattern", "seed"}


def quality_parts(
    results: SweepResults,
    label: str,
    cells: list[CellResult],
    text: str,
    speeds: Mapping[str, float],
) -> list[Any]:
    """Tables of perplexity, residual gap and KL divergence, and charts, as means over seeds.

    Args:
        results: the whole sweep.
        label: name of the model in the sweep.
        cells: the cells of that model.
        text: name of the scoring text.
        speeds: model as it was given to `prunus bench` -> tokens per second.
    """
    axis, place = next(
        ((name, f) for name, f in _AXES.items() if len({f(cell.recipe) for cell in cells}) > 1),
        ("sparsity", _AXES["sparsity"]),
    )
    tops = list(dict.fromkeys(place(cell.recipe) for cell in cells))
    name_of = _row_names(cells, axis)
    groups: dict[str, dict[Any, list[CellResult]]] = {}
    for cell in cells:
        groups.setdefault(name_of[cell.name], {}).setdefault(place(cell.recipe), []).append(cell)
    dense = results.models[label].scores.get(text)
    level = dense.perplexity if dense is not None else None

    where = f"{text_name(text)}, {label}" if len(results.models) > 1 else text_name(text)
    seeds = len({cell.recipe.seed for cell in cells})
    note = f"Means over {seeds} seeds. " if seeds > 1 else ""

    def table(
        title: str,
        figure: Callable[[CellResult], float | None],
        note: str,
        first: tuple[Any, ...] = (),
        form: str = ",.2f",
    ) -> Table:
        rows = [
            (name, *(_mean([figure(cell) for cell in row.get(top, [])]) for top in tops))
            for name, row in groups.items()
        ]
        columns = (Column("method"), *(Column(_column_title(axis, top), form) for top in tops))
        return Table(title, columns, (*([first] if first else []), *rows), note)

    def perplexity(cell: CellResult) -> float | None:
        return cell.scores[text].perplexity if text in cell.scores else None

    parts: list[Any] = [
        table(
            f"Perplexity on {where}",
            perplexity,
            note + (f"By {axis}; lower is better." if len(tops) > 1 else "Lower is better."),
            ("dense", *([level] * len(tops))),
        )
    ]
    if any(cell.residual_gap.get(text) is not None for cell in cells):
        parts.append(
            table(
                f"Residual gap on {where}",
                lambda cell: cell.residual_gap.get(text),
                note
                + "(perplexity − dense) / (perplexity of Wanda − dense) under the same conditions: "
                "Wanda is 1, lossless is 0. Left out where Wanda loses less than 1 % of the dense "
                "perplexity.",
            )
        )
    if any(_kl(cell, text) is not None for cell in cells):
        parts.append(
            table(
                f"KL divergence on {where}",
                lambda cell: _kl(cell, text),
                note + "From the dense model, in nats per token; lower is better.",
                form=",.4f",
            )
        )
    points = [
        _point(name, _column_title(axis, top), row[top], text, perplexity, speeds)
        for name, row in groups.items()
        for top in tops
        if top in row
    ]
    parts += size_charts(where, points, level)
    chart = _chart(f"Perplexity on {where} by {axis}", axis, tops, groups, perplexity, level)
    return [chart, *parts] if chart is not None else parts


def _kl(cell: CellResult, text: str) -> float | None:
    score = cell.scores.get(text)
    return score.divergence.kl if score is not None and score.divergence is not None else None


def _point(
    series: str,
    top: str,
    cells: list[CellResult],
    text: str,
    perplexity: Callable[[CellResult], float | None],
    speeds: Mapping[str, float],
) -> Result:
    """The mean over seeds as a point of the charts of quality against size."""
    sizes = [cell.size.smallest if cell.size is not None else (None, None) for cell in cells]
    nbytes = _mean([nbytes for nbytes, _ in sizes])
    return Result(
        series,
        f"{series}, {top}",
        None if nbytes is None else nbytes / 1e9,
        _mean([bits for _, bits in sizes]),
        _mean([decode_speed(speeds, cell.name, cell.name) for cell in cells]),
        _mean([_kl(cell, text) for cell in cells]),
        _mean([perplexity(cell) for cell in cells]),
    )


def _chart(
    title: str,
    axis: str,
    tops: list[Any],
    groups: dict[str, dict[Any, list[CellResult]]],
    figure: Callable[[CellResult], float | None],
    level: float | None,
) -> Lines | None:
    numeric = all(not isinstance(top, str) or top.endswith("%") for top in tops) and len(tops) > 2
    series = []
    for name, row in groups.items():
        points = [
            (top, value, [v for cell in row[top] if (v := figure(cell)) is not None])
            for top in tops
            if top in row and (value := _mean([figure(cell) for cell in row[top]])) is not None
        ]
        if not points:
            continue
        hover = tuple(
            f"{name}, {_column_title(axis, top)}: {value:,.3f}"
            + (
                f" (mean of {len(values)} seeds, {min(values):,.3f} to {max(values):,.3f})"
                if len(values) > 1
                else ""
            )
            for top, value, values in points
        )
        x = tuple(_number(top) if numeric else _column_title(axis, top) for top, _, _ in points)
        series.append(Series(name, x, tuple(value for _, value, _ in points), hover))
    values = [y for one in series for y in one.y] + ([level] if level is not None else [])
    if not series:
        return None
    xs = [_number(top) for top in tops] if numeric else []
    return Lines(
        title,
        f"{axis} (%)" if numeric and axis == "sparsity" else axis,
        "perplexity",
        tuple(series),
        level=("dense", level) if level is not None else None,
        categories=() if numeric else tuple(_column_title(axis, top) for top in tops),
        log_x=bool(xs) and min(xs) > 0 and max(xs) / min(xs) >= 16,
        log_y=max(values) / min(values) >= LOG_FROM,
    )


def _row_names(cells: list[CellResult], axis: str) -> dict[str, str]:
    """Cell -> name of its row: the method, and the options that vary among the method's cells."""
    found = {}
    hidden = _NOT_IN_ROWS | {
        "calibration windows": {"samples"},
        "tokens per window": {"seqlen"},
    }.get(axis, set())
    for cell in cells:
        alike = [
            other.recipe.model_dump()
            for other in cells
            if other.recipe.method == cell.recipe.method
        ]
        parts: list[str] = [cell.recipe.method]
        for key, value in cell.recipe.model_dump().items():
            if key not in hidden and any(other[key] != value for other in alike):
                parts.append(f"{key.replace('_', ' ')} {value}")
        if axis != "sparsity" and any(
            _shape(other.recipe) != _shape(cell.recipe) for other in cells
        ):
            parts.append(_shape(cell.recipe))
        if cell.recovery is not None:
            parts.append(f"recovered by {cell.recovery}")
        found[cell.name] = ", ".join(parts)
    return found


def _shape(recipe: Recipe) -> str:
    return recipe.pattern if recipe.n_of_m else f"{100 * recipe.sparsity:g}%"


def _column_title(axis: str, top: Any) -> str:
    if axis == "sparsity":
        return str(top)
    unit = "window" if "windows" in axis else "token"
    return f"{top:,} {unit}{'' if top == 1 else 's'}"


def _number(top: Any) -> float:
    return float(top.removesuffix("%")) if isinstance(top, str) else float(top)


def text_name(text: str) -> str:
    """The name of a scoring text: a dataset's own, or a file's without its folder."""
    return Path(text).name


def _mean(values: list[float | None]) -> float | None:
    """Mean over seeds, or None if a value is missing: all means are over the same seeds."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
