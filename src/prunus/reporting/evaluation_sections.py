"""What `prunus eval --json` writes, as a section.

A row of figures maps the title of a column to a value; see `prunus.evaluation.eval_records.FORMS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prunus.document import (
    Best,
    Facts,
    Lines,
    Measured,
    Section,
    Series,
    Table,
    items_of,
    plain,
    plain_rows,
    short_names,
    table_of,
    text_of,
)
from prunus.evaluation.eval_records import (
    BEST,
    FORMS,
    UNITS,
    ModelSize,
    PerplexityResult,
    finite,
    task_metrics,
)
from prunus.rounding.llama_cpp_losses import models_of, place
from prunus.sweeping.results import DENSE

#: Metrics of lm-eval that are shares of the rows.
_SHARES = ("acc", "exact_match", "f1", "em")
#: An axis is logarithmic from this ratio of the largest to the smallest value.
_LOG_X_FROM, _LOG_Y_FROM = 16.0, 6.0
#: Columns for a chart's x axis. The first size that tells results apart is taken.
SIZES = ("file, GB", "bits per weight")
#: Sizes with at most this ratio are the same: the headers of files differ by some bytes.
_SAME_SIZE = 1.01
#: Metric of a difference between two models -> the title of its column.
_PAIRED = {
    "kl": "KL divergence",
    "same_top": "same top token",
    "loss": "loss, nats per token",
}
_OF_TOKENS = (
    "The KL divergences of single tokens in nats, and where the largest is: the number of the "
    "window, the position of the token in it, the text before, and the token."
)


def evaluation_section(content: dict[str, Any]) -> Section:
    """The section of an evaluation: the answer in short, quality and size, then tasks.

    Args:
        content: The JSON of `prunus eval --json` or of lm-eval, as Python objects.

    Raises:
        LookupError, TypeError, ValueError: `content` is something else. `write.py` says so to
            users.
    """
    if "results" in content:  # lm-eval's own file of results
        model = {"model": content["model_name"], "perplexity": [], "tasks": content}
        content = {"models": [model], "differences": []}
    models = content["models"]
    names = short_names([model["model"] for model in models])
    scores = {
        model["model"]: [PerplexityResult(**score) for score in model["perplexity"]]
        for model in models
    }
    sizes = {model["model"]: _size(model) for model in models}
    tasks = {
        model["model"]: _metrics(model["tasks"]) for model in models if model["tasks"] is not None
    }
    reference = content.get("reference")
    dense_name = None if reference is None else reference["model"]
    pairs = _pairs(content.get("text_differences", []), names, dense_name)
    parts = [*_quality(scores, sizes, names), *pairs, *_tasks(tasks, content["differences"], names)]
    if reference is not None:
        dense = _size(reference)
        words = [(names[x], _in_short(scores[x], sizes[x], dense)) for x in names]
        parts.insert(0, Facts("Next to the dense model", tuple(words), headline=True))
        parts.insert(
            1,
            Facts(
                f"Beside llama.cpp's formats of {models_of()}",
                tuple(
                    (f"{names[x]}, {_short(score)}", place(score.divergence.kl, _short(score)))
                    for x, of_model in scores.items()
                    for score in of_model
                    if score.divergence
                ),
            ),
        )
    on_tasks = {
        names[model]: {f"{task}, {metric}": of["figure"] for (task, metric), of in metrics.items()}
        for model, metrics in tasks.items()
    }
    if on_tasks:
        parts.append(tasks_table("Side by side on tasks", on_tasks, best=True))
    data = [
        {"model": model}
        | {
            f"{title}, {_short(score)}": figure
            for score in scores[model]
            for title, figure in (score.figures() | score.token_figures()).items()
        }
        | sizes[model]
        | on_tasks.get(names[model], {})
        for model in names
    ]
    # Models with different tokenizers have different windows of one text.
    protocols: dict[str, dict[str, None]] = {}
    for score in itertools.chain(*scores.values()):
        protocols.setdefault(score.source, {})[score.measured_on] = None
    items = tuple((text, "; for other models ".join(words)) for text, words in protocols.items())
    details = [Facts("Protocol", items)] if items else []
    for of_tasks in [model["tasks"] for model in models if model["tasks"] is not None][:1]:
        # lm-eval's version and how it computed; the text on the machine is pages long.
        shown = {key: of_tasks.get(key) for key in ("lm_eval_version", "transformers_version")}
        shown |= {key: value for key, value in of_tasks["config"].items() if value is not None}
        details.append(Facts("Protocol of the tasks", items_of(shown)))
    title = "Evaluation of " + ", ".join(names.values())
    return Section(title, "", tuple(parts), tuple(details), plain_rows(data))


def _size(model: dict[str, Any]) -> dict[str, Any]:
    size = model.get("size")
    return ModelSize(**size).figures() if size else {}


def _in_short(scores: Sequence[PerplexityResult], size: dict[str, Any], dense: Any) -> str:
    """How much smaller and worse a model is than the dense one."""
    title, smaller = "file, GB", []
    if size.get(title) and dense.get(title):
        smaller = [f"{size[title] / dense[title]:.0%} of the size"]
    worse = [
        f"KL {score.divergence.kl:.3f} and the same top token for {score.divergence.same_top:.1%} "
        f"on {_short(score)}"
        for score in scores
        if score.divergence
    ]
    return ", ".join([*smaller, *worse])


def _short(score: PerplexityResult) -> str:
    """The name of a text, without what the protocol says of it."""
    return score.source.partition(" (")[0]


def _quality(
    scores: Mapping[str, list[PerplexityResult]],
    sizes: Mapping[str, dict[str, Any]],
    names: dict[str, str],
) -> list[Any]:
    """One table of perplexity, divergence and size, and a chart for each text."""
    rows: list[dict[str, Any]] = []
    token_rows = []
    charts, reference = [], None
    for texts in zip(*scores.values(), strict=True):
        points, where = [], _short(texts[0])
        for model, score in zip(scores, texts, strict=True):
            figures = score.figures() | sizes[model]
            rows.append({"model": names[model], "text": where} | figures)
            points.append(Point(names[model], names[model], figures))
            token_rows.append({"model": names[model], "text": where} | score.token_figures())
            if score.divergence is not None:
                reference = score.divergence
        dense = None if reference is None else finite(reference.reference_perplexity)
        charts += quality_charts(where, points, dense)
    if not rows:
        rows = [{"model": names[model]} | size for model, size in sizes.items()]
    note = "Lower perplexity is better." if charts or "text" in rows[0] else ""
    if reference is not None:
        name = Path(reference.reference).name or reference.reference
        note += f" Compared with {name}: {UNITS}; ± one standard error over windows."
    if any(size.get("bits per weight") for size in sizes.values()):
        note += " Bits per weight of the linears; scales count too."
    # Figures on several texts do not compete.
    best = BEST if len({row.get("text") for row in rows}) == 1 else {}
    table = table_of("Quality and size", rows, FORMS, note.strip(), best=best)
    tokens = table_of("Single tokens", token_rows, FORMS, _OF_TOKENS)
    tables = [table] * (len(table.columns) > 1) + [tokens] * (len(tokens.columns) > 2)
    return [*tables, *charts]


def _pairs(
    changes: Sequence[dict[str, Any]], names: Mapping[str, str], reference: str | None
) -> list[Table]:
    """One row for every two models and every text: how much more the first loses.

    Beside the reference, whose own share of the same top token is 1, stands the share of the other
    model, as llama-perplexity prints it.
    """
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for change in changes:
        model, than, text = names[change["model"]], names[change["than"]], change["task"]
        place = {"model": model, "minus": than, "text": text.partition(" (")[0]}
        row = rows.setdefault((model, than, text), place)
        title = _PAIRED.get(change["metric"], change["metric"])
        row[title] = Measured(change["value"], change["stderr"])
        if change["metric"] == "same_top" and reference in (change["model"], change["than"]):
            row[title] = Measured(1 - abs(change["value"]), change["stderr"], ".2%")
        if change["metric"] == "kl":
            row["beyond chance"] = "yes" if change["beyond_two_standard_errors"] else "no"
    forms = {title: f"+{FORMS.get(title, '.5f')}" for title in _PAIRED.values()}
    note = (
        "Differences of two models, window by window, ± one standard error over windows. Beyond "
        "chance: the KL divergences differ by more than two standard errors. Beside the reference, "
        "the same top token is no difference: it is the share of the other model."
    )
    return [table_of("Differences between models", rows.values(), forms, note)] if rows else []


def _tasks(
    metrics_by_model: Mapping[str, Mapping[tuple[str, str], dict[str, Any]]],
    differences: Sequence[dict[str, Any]],
    names: dict[str, str],
) -> list[Table]:
    """One row per task, metric and model, with the difference to the first model."""
    changes = {
        (change["model"], change["task"], change["metric"]): change for change in differences
    }
    rows = []
    for key in next(iter(metrics_by_model.values()), ()):
        for model, metrics in metrics_by_model.items():
            change = changes.get((model, *key))
            row = {"task": key[0], "metric": key[1], "model": names[model]} | metrics.get(key, {})
            if change is not None:
                form = "+" + form_of(key[1])
                row["− first"] = Measured(change["value"], change["stderr"], form)
                row["beyond chance"] = "yes" if change["beyond_two_standard_errors"] else "no"
            rows.append(row)
    if not rows:
        return []
    note = "± one standard error."
    if changes:
        paired = all(change["paired"] for change in changes.values())
        how = "taken row by row" if paired else "row by row where rows are known"
        note += f" Beyond chance: more than two standard errors of the difference, {how}."
    forms = {"figure": ".4g", "− first": "+.4g", "shots": "d", "rows": ",d"}
    return [table_of("Tasks", rows, forms, note)]


def _metrics(results: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """(task, metric) -> its figure, and how many shots and rows it is from."""
    return {
        (task, name): {
            "figure": Measured(metric.value, metric.stderr, form_of(name)),
            "shots": results["n-shot"].get(task),
            "rows": results["results"][task].get("sample_len"),
        }
        for (task, name), metric in task_metrics(results).items()
    }


def tasks_table(
    title: str, figures_by_model: Mapping[str, Mapping[str, Any]], *, best: bool = False
) -> Table:
    """One row per model: the accuracy on each task, or all metrics of a task that has none.

    Args:
        title: Heading of the table.
        figures_by_model: Name of a row -> task and metric, with a comma between -> figure.
        best: Whether the rows compete.
    """
    rows, forms = [], {}
    for name, figures in figures_by_model.items():
        row: dict[str, Any] = {"model": name}
        for key, figure in figures.items():
            task, _, metric = key.rpartition(", ")
            if metric == "acc" or f"{task}, acc" not in figures:
                column = task if metric == "acc" else key
                row[column] = figure
                forms[column] = form_of(metric)
        rows.append(row)
    note = "Accuracy unless another metric is named; ± one standard error."
    winners: dict[str, Best] = {
        column: "highest" for column, form in forms.items() if best and form == ".2%"
    }
    return table_of(title, rows, forms, note, best=winners)


def form_of(metric: str) -> str:
    """Format of a metric of lm-eval: shares such as `acc_norm` in percent, others as they are.

    >>> form_of("acc_norm"), form_of("perplexity")
    ('.2%', '.4g')
    """
    share = metric.partition(" ")[0].partition("_norm")[0] in _SHARES
    return ".2%" if share else ".4g"


class Point(NamedTuple):
    """A result in a chart.

    Attributes:
        series: Name of the line that joins the results of one method.
        name: What stands under the pointer.
        figures: Title of a column -> value, such as `perplexity`; see `FORMS`.
    """

    series: str
    name: str
    figures: Mapping[str, Any]


def quality_charts(where: str, points: Sequence[Point], dense: float | None) -> list[Lines]:
    """A chart of perplexity against size; empty where all have the same size.

    Args:
        where: Name of the text, for the title.
        points: The results. The chart leaves out those that lack a figure.
        dense: Perplexity of the dense model, which becomes a horizontal line; None if it is
            unknown.
    """
    for title in SIZES:
        chart = line_chart(
            f"Perplexity on {where} against size", title, "perplexity", points, dense
        )
        if _ratio([x for line in chart.series for x in line.x]) > _SAME_SIZE:
            return [chart]
    return []


def line_chart(
    heading: str,
    x_title: str,
    y_title: str,
    points: Sequence[Point],
    dense: float | None = None,
    x_names: Sequence[str] = (),
) -> Lines:
    """A chart of one figure against another, with a line for each series of points.

    Axes are logarithmic where the values differ by a large factor.

    Args:
        heading: Heading of the chart.
        x_title: The figure on the x axis.
        y_title: The figure on the y axis; its errors become error bars.
        points: The results, of which those that lack a figure are left out.
        dense: The figure of the dense model, a horizontal line; None for none.
        x_names: See `Lines`.
    """
    lines: dict[str, list[tuple[float, float, str, float]]] = {}
    for point in points:
        x, figure = plain(point.figures.get(x_title)), point.figures.get(y_title)
        if x is None or figure is None:
            continue
        y = plain(figure)
        text = f"{point.name}: {text_of(y, FORMS[y_title])}"
        # The name of a point says where it is on other axes, such as that of sparsity.
        text += f" at {text_of(x, FORMS[x_title])}" if x_title in FORMS else ""
        kl = plain(point.figures.get("KL divergence"))
        text += "" if kl is None or y_title == "KL divergence" else f", KL {kl:.4f}"
        error = getattr(figure, "stderr", None) or 0.0
        lines.setdefault(point.series, []).append((x, y, text, error))
    series = tuple(
        Series(name, *zip(*sorted(line, key=lambda place: place[0]), strict=True))
        for name, line in lines.items()
    )
    xs = [x for line in series for x in line.x]
    ys = [y for line in series for y in line.y] + ([] if dense is None else [dense])
    return Lines(
        heading,
        x_title,
        y_title,
        series,
        level=None if dense is None else (DENSE, dense),
        log_x=_ratio(xs) >= _LOG_X_FROM,
        log_y=_ratio(ys) >= _LOG_Y_FROM,
        round_ticks=x_title in FORMS,
        x_names=tuple(x_names),
    )


def _ratio(values: Sequence[float]) -> float:
    """The largest value over the smallest; 1 where a logarithm would need positive values."""
    return max(values) / min(values) if values and min(values) > 0 else 1.0
