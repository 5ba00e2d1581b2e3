"""A sweep as a section: quality by method and sparsity, then the cells, protocol and machine.

Quality on one text is shown as means over seeds. Rows are methods. Columns are the first of
sparsity, number of windows and tokens per window that varies among the cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import Any, NamedTuple

from prunus.document import (
    Column,
    DocumentPart,
    Facts,
    Lines,
    Measured,
    Section,
    Table,
    items_of,
    plain,
    plain_rows,
    short_names,
)
from prunus.evaluation.eval_records import BEST, FORMS
from prunus.pruning.recipe import Recipe
from prunus.reporting.evaluation_sections import (
    SIZES,
    Point,
    form_of,
    line_chart,
    quality_charts,
    tasks_table,
)
from prunus.sweeping.results import (
    DENSE,
    CellResult,
    SweepResults,
    SweptModel,
    varying_options,
)
from prunus.words import counted

# State of a cell -> what a run of the sweep would do with it.
_WHAT_WOULD_HAPPEN = {
    "waiting": "would run",
    "running": "would continue",
    "failed": "failed, would run again",
    "done": "done",
}


class _Axis(NamedTuple):
    """What varies among the cells: a column of the tables, and the x axis of the charts.

    Attributes:
        name: Its name.
        title: Title of the x axis.
        fields: The options that decide it, which the names of rows leave out.
        value: What a recipe has on it: a number, or a pattern.
        words: A value as the title of a column.
    """

    name: str
    title: str
    fields: tuple[str, ...]
    value: Callable[[Recipe], float | str]
    words: Callable[[Any], str]


_AXES = (
    _Axis(
        "sparsity",
        "sparsity (%)",
        ("sparsity", "pattern"),
        lambda recipe: (
            "by hand"
            if recipe.sparsity_of
            else "given"
            if recipe.masks is not None
            else recipe.pattern
            if recipe.n_of_m
            else round(100 * recipe.sparsity, 6)
        ),
        lambda top: top if isinstance(top, str) else f"{top:g}%",
    ),
    _Axis(
        "calibration windows",
        "calibration windows",
        ("samples",),
        lambda recipe: recipe.samples,
        lambda top: counted(top, "window"),
    ),
    _Axis(
        "tokens per window",
        "tokens per window",
        ("seqlen",),
        lambda recipe: recipe.seqlen,
        lambda top: counted(top, "token"),
    ),
)
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
    shown: list[DocumentPart] = [_headline(results)]
    folded: list[DocumentPart] = [results.table()]
    texts = short_names(results.scoring["texts"])
    comparison = _Comparison(results)
    for text, where in texts.items():
        on_text = partial(SweptModel.figures, text=text)
        for figure, note in _NOTES.items():
            title = f"{figure[:1].upper()}{figure[1:]} on {where}"
            tables = comparison.table(title, on_text, figure, note)
            (folded if figure == "residual gap" else shown).extend(tables)
        shown += comparison.charts(text, where)
    if results.scoring.get("tasks"):
        on_tasks = {name: model.task_figures() for name, _, model in results.every_model()}
        shown.append(tasks_table("Tasks", on_tasks))
        for figure in dict.fromkeys(figure for figures in on_tasks.values() for figure in figures):
            folded += comparison.table(figure, SweptModel.task_figures, figure)
    failed = tuple((name, x.error) for name, _, x in results.every_model() if x.error)
    if failed:
        shown.append(Table("What failed", (Column("model"), Column("reason")), failed))
    folded += _circumstances(results, texts)
    lead = " ".join(results.description.split())
    data = plain_rows(results.rows())
    return Section(results.title, lead, tuple(shown), tuple(folded), data)


def check_section(results: SweepResults) -> Section:
    """The section of a sweep that was only checked: every cell, and what would become of it.

    Args:
        results: The results of an earlier run of the sweep, with all cells of this one.
    """
    changed = {name: f"would be measured again: {why}" for name, why in results.changed.items()}
    rows = tuple(
        (name, label, changed.get(name, _WHAT_WOULD_HAPPEN[cell.state]))
        for name, label, cell in results.every_model()
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


def _circumstances(results: SweepResults, texts: Mapping[str, str]) -> list[Facts]:
    protocol = {"command": f"prunus sweep {results.file} OUT"}
    for text, name in texts.items():
        scores = [model.scores[text] for model in results.models.values() if text in model.scores]
        words = dict.fromkeys(f"{score.source}; {score.measured_on}" for score in scores)
        if words:
            protocol[f"scored on {name}"] = "; for other models ".join(words)
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


class _Comparison:
    """The cells of a sweep as rows of methods, and columns of models and what varies."""

    def __init__(self, results: SweepResults) -> None:
        self.models = results.models
        recipes = [cell.recipe for cell in results.cells]
        self.axis = next((x for x in _AXES if len(set(map(x.value, recipes))) > 1), _AXES[0])
        # Name of a row, model and value on the axis -> the cells, which differ in the seed alone.
        self.cells: dict[tuple[str, str, float | str], list[CellResult]] = {}
        names = _row_names(results.cells, self.axis)
        for name, cell in zip(names, results.cells, strict=True):
            key = (name, cell.model, self.axis.value(cell.recipe))
            self.cells.setdefault(key, []).append(cell)
        self.seeds = max(map(len, self.cells.values()), default=1)

    def means(
        self, figures_of: Callable[[SweptModel], Mapping[str, Any]], figure: str
    ) -> dict[tuple[str, str, Any], Any]:
        """Row, model and value on the axis -> mean and standard deviation over the seeds.

        In a sweep with one seed, a figure stays as it is, without the error that its source has. It
        is left out where a cell lacks it: all means of a row are over the same seeds.
        """
        means: dict[tuple[str, str, Any], Any] = {}
        for key, cells in self.cells.items():
            measured = [plain(figures_of(cell).get(figure)) for cell in cells]
            values = [value for value in measured if value is not None]
            if len(values) == len(cells):
                deviation = stdev(values) if len(values) > 1 else None
                seeds = None if len(values) == self.seeds else len(values)
                mean = Measured(fmean(values), deviation, seeds=seeds)
                means[key] = mean if self.seeds > 1 else values[0]
        return means

    def table(
        self,
        title: str,
        figures_of: Callable[[SweptModel], Mapping[str, Any]],
        figure: str,
        note: str = "",
    ) -> list[Table]:
        """A row for each method, and one for the dense models; empty where nothing was measured."""
        means = self.means(figures_of, figure)
        form = FORMS.get(figure) or form_of(figure.rpartition(", ")[2])
        best = BEST.get(figure) or ("highest" if form == ".2%" else None)
        tops = dict.fromkeys((label, top) for _, label, top in self.cells)
        columns = [Column("method")]
        for label, top in tops:
            words = [label] * (len(self.models) > 1)
            words += [self.axis.words(top)] * (len({top for _, top in tops}) > 1 or not words)
            # Wanda itself has a residual gap of 1.
            unit = 1.0 if figure == "residual gap" else None
            columns.append(Column(", ".join(words), form, best, unit))
        rows = [
            (name, *(means.get((name, *top)) for top in tops))
            for name in dict.fromkeys(name for name, *_ in self.cells)
        ]
        dense = [plain(figures_of(self.models[label]).get(figure)) for label, _ in tops]
        rows = [(DENSE, *dense)] * any(value is not None for value in dense) + rows
        if not any(value is not None for _, *values in rows for value in values):
            return []
        over = f"Mean ± standard deviation over {self.seeds} seeds. " if self.seeds > 1 else ""
        return [Table(title, tuple(columns), tuple(rows), over + note)]

    def charts(self, text: str, where: str) -> list[Lines]:
        """For each model: perplexity against size, and quality against what varies.

        A chart over the axis needs two values on it. If one of them is a pattern, all stand side by
        side by name: numbers first, patterns in the order of the sweep file.
        """
        tops = dict.fromkeys(top for _, _, top in self.cells)
        place_of, names, x_title = {x: x for x in tops}, list[str](), self.axis.title
        if any(isinstance(top, str) for top in tops):
            in_order = sorted(tops, key=lambda x: math.inf if isinstance(x, str) else x)
            place_of = {top: place for place, top in enumerate(in_order)}
            names, x_title = [*map(self.axis.words, in_order)], self.axis.name
        figures = ("perplexity", "KL divergence", *SIZES)
        on_text = partial(SweptModel.figures, text=text)
        means = {figure: self.means(on_text, figure) for figure in figures}
        charts = []
        for label, model in self.models.items():
            place = f"{where}, {label}" if len(self.models) > 1 else where
            dense = model.figures(text)
            points = [Point(DENSE, DENSE, dense)]
            for name, of, top in self.cells:
                if of == label:
                    at = {figure: means[figure].get((name, of, top)) for figure in figures}
                    at |= {x_title: place_of[top]}
                    points.append(Point(name, f"{name}, {self.axis.words(top)}", at))
            charts += quality_charts(place, points, dense.get("perplexity"))
            for figure, level in (("perplexity", dense.get("perplexity")), ("KL divergence", None)):
                title = f"{figure[:1].upper()}{figure[1:]} on {place} by {self.axis.name}"
                chart = line_chart(title, x_title, figure, points, level, names)
                if len({x for line in chart.series for x in line.x}) > 1:
                    charts.append(chart)
        return charts


def _row_names(cells: Sequence[CellResult], axis: _Axis) -> list[str]:
    """For each cell the method, and the options that vary among the cells of the method."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        options = cell.options()
        by_method.setdefault(options["method"], []).append(options)
    varying = {method: varying_options(same) for method, same in by_method.items()}
    names = []
    for cell in cells:
        options = cell.options()
        parts = [
            f"{key.replace('_', ' ')} {options[key]}"
            for key in varying[options["method"]]
            if key in options and key not in (*axis.fields, "seed")
        ]
        parts += [f"recovered by {cell.recovery}"] if cell.recovery is not None else []
        names.append(", ".join([options["method"], *parts]))
    return names
