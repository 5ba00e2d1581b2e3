"""Terminal tables of `prunus eval`: perplexity, divergence and tasks of several models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table

from prunus.reporting.document import MISSING
from prunus.reporting.evaluation_sections import is_share, short_names

if TYPE_CHECKING:
    from prunus.evaluation.comparison import Difference
    from prunus.evaluation.records import PerplexityResult
    from prunus.evaluation.task_scores import Metric, TaskResults

#: With more models than these, each model has a row of its own.
_MODELS_IN_COLUMNS = 2

__all__ = ["divergence_table", "evaluation_tables", "perplexity_table", "tasks_table"]


def evaluation_tables(
    perplexities: Mapping[str, Sequence[PerplexityResult]], results: Sequence[TaskResults]
) -> Group:
    """Tables of perplexities, of divergences and of tasks, each only if there are such figures.

    Args:
        perplexities: model -> its perplexities.
        results: of the same models on tasks.
    """
    from prunus.evaluation.comparison import compare

    tables = [perplexity_table(perplexities)] if any(perplexities.values()) else []
    if any(score.divergence is not None for scores in perplexities.values() for score in scores):
        tables.append(divergence_table(perplexities))
    return Group(*tables, *([tasks_table(results, compare(results))] if results else []))


def perplexity_table(results: Mapping[str, Sequence[PerplexityResult]]) -> Table:
    """One row per text and one column per model; of more than two models, one row per model.

    The protocol stands below the table, because figures of different protocols do not compare.

    Args:
        results: model -> its perplexities, on the same texts for every model.
    """
    models = list(results)
    if len(models) > _MODELS_IN_COLUMNS:
        return _with_protocols(_models_in_rows(results), results)
    first = results[models[0]]
    table = Table(title="perplexity" if len(models) > 1 else models[0], title_justify="left")
    table.add_column("text")
    names = list(short_names(models).values())
    for name in names if len(models) > 1 else ["perplexity"]:
        table.add_column(name, justify="right", overflow="fold")
    for name in names[1:]:
        table.add_column(f"{name} − first", justify="right", overflow="fold")
    for name in ("context", "windows", "tokens", "seconds"):
        table.add_column(name, justify="right")
    for position, result in enumerate(first):
        scores = [results[model][position] for model in models]
        table.add_row(
            result.source,
            *(f"{score.perplexity:.3f}" for score in scores),
            *(f"{score.perplexity - result.perplexity:+.3f}" for score in scores[1:]),
            str(result.seqlen),
            str(result.windows),
            f"{result.tokens:,}",
            f"{sum(score.seconds for score in scores):.1f}",
        )
    return _with_protocols(table, results)


def _models_in_rows(results: Mapping[str, Sequence[PerplexityResult]]) -> Table:
    """One row per text and model, with the difference to the first model."""
    table = Table(title="perplexity", title_justify="left")
    for name in ("text", "model"):
        table.add_column(name, overflow="fold")
    for name in ("perplexity", "− first", "context", "windows", "tokens", "seconds"):
        table.add_column(name, justify="right")
    names = short_names(list(results))
    first = next(iter(results.values()))
    for position, one in enumerate(first):
        for model, scores in results.items():
            score = scores[position]
            table.add_row(
                score.source if score is one else "",
                names[model],
                f"{score.perplexity:.3f}",
                MISSING if score is one else f"{score.perplexity - one.perplexity:+.3f}",
                str(score.seqlen),
                str(score.windows),
                f"{score.tokens:,}",
                f"{score.seconds:.1f}",
            )
        table.add_section()
    return table


def _with_protocols(table: Table, results: Mapping[str, Sequence[PerplexityResult]]) -> Table:
    table.caption = "\n".join(
        dict.fromkeys(score.protocol for scores in results.values() for score in scores)
    )
    table.caption_justify = "left"
    return table


def divergence_table(results: Mapping[str, Sequence[PerplexityResult]]) -> Table:
    """One row per text and model: how far the model's predictions are from the reference's.

    Args:
        results: model -> its perplexities, each with a divergence.
    """
    scores = [score for ones in results.values() for score in ones]
    compared = [score.divergence for score in scores if score.divergence is not None]
    table = Table(title=f"compared with {compared[0].reference}", title_justify="left")
    for name in ("text", "model"):
        table.add_column(name, overflow="fold")
    for name in ("KL, nats per token", "99.9 % quantile", "same top token, %", "perplexity ratio"):
        table.add_column(name, justify="right")
    names = short_names(list(results))
    for place in range(len(next(iter(results.values())))):
        for model, ones in results.items():
            found = ones[place].divergence
            if found is None:
                continue
            table.add_row(
                ones[place].source,
                names[model],
                _measured(found.kl, found.kl_stderr, 5),
                f"{found.kl_q999:.3f}",
                _measured(
                    100 * found.same_top,
                    None if found.same_top_stderr is None else 100 * found.same_top_stderr,
                    2,
                ),
                _measured(found.perplexity_ratio, found.perplexity_ratio_stderr, 4),
            )
        table.add_section()
    table.caption = "± one standard error over windows; KL of the model from the reference"
    table.caption_justify = "left"
    return table


def _measured(value: float, stderr: float | None, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text if stderr is None else f"{text} ± {stderr:.{digits}f}"


def tasks_table(results: Sequence[TaskResults], differences: Sequence[Difference] = ()) -> Table:
    """One row per task and metric; one column per model, and one per difference to the first model.

    Of more than two models, each has a row of its own below the task and metric.

    Args:
        results: of models on the same tasks.
        differences: of `compare(results)`.
    """
    if len(results) > _MODELS_IN_COLUMNS:
        table = _tasks_with_models_in_rows(results, differences)
        table.caption = _explanation(results, differences)
        table.caption_justify = "left"
        return table
    table = Table(title="tasks", title_justify="left")
    for name in ("task", "metric"):
        table.add_column(name)
    for name in ("shots", "rows"):
        table.add_column(name, justify="right")
    names = list(short_names([result.model for result in results]).values())
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for name in names[1:]:
        table.add_column(f"{name} − first", justify="right", overflow="fold")
    by_key = {(change.model, change.task, change.metric): change for change in differences}
    scores = {score.task: score for score in results[0].scores}
    before = None
    for task, metric in results[0].metrics():
        if before is not None and task != before:
            table.add_section()
        score = scores.get(task)
        figures = [result.metrics().get((task, metric)) for result in results]
        changes = [by_key.get((result.model, task, metric)) for result in results[1:]]
        table.add_row(
            task if task != before else "",
            metric,
            "" if score is None else str(score.shots),
            "" if score is None else f"{score.rows:,}",
            *(_figure(metric, figure) for figure in figures),
            *(_change(metric, change) for change in changes),
        )
        before = task
    table.caption = _explanation(results, differences)
    table.caption_justify = "left"
    return table


def _tasks_with_models_in_rows(
    results: Sequence[TaskResults], differences: Sequence[Difference]
) -> Table:
    table = Table(title="tasks", title_justify="left")
    for name in ("task", "metric", "model"):
        table.add_column(name, overflow="fold")
    for name in ("figure", "− first", "shots", "rows"):
        table.add_column(name, justify="right")
    names = short_names([result.model for result in results])
    by_key = {(change.model, change.task, change.metric): change for change in differences}
    for task, metric in results[0].metrics():
        for result in results:
            is_first = result is results[0]
            score = next((score for score in result.scores if score.task == task), None)
            table.add_row(
                task if is_first else "",
                metric if is_first else "",
                names[result.model],
                _figure(metric, result.metrics().get((task, metric))),
                MISSING if is_first else _change(metric, by_key.get((result.model, task, metric))),
                "" if score is None else str(score.shots),
                "" if score is None else f"{score.rows:,}",
            )
        table.add_section()
    return table


def _explanation(results: Sequence[TaskResults], differences: Sequence[Difference]) -> str:
    protocol = results[0].protocol
    names = [result.model for result in results]
    lines = [
        f"models: {', '.join(names)}",
        "acc and acc_norm in percent ± one standard error; "
        f"lm-eval {protocol['versions']['lm_eval']}, dtype {protocol['dtype']}, "
        f"batch {protocol['batch']}, on {protocol['device']}",
    ]
    if differences:
        paired = all(change.paired for change in differences)
        how = "taken row by row" if paired else "row by row where rows are known"
        lines.append(f"* beyond two standard errors of the difference ({how})")
    return "\n".join(lines)


def _figure(metric: str, figure: Metric | None) -> str:
    if figure is None:
        return MISSING
    return _with_error(metric, figure.value, figure.stderr, "")


def _change(metric: str, change: Difference | None) -> str:
    if change is None:
        return MISSING
    return _with_error(metric, change.value, change.stderr, "+") + (
        " *" if change.significant else ""
    )


def _with_error(metric: str, value: float, stderr: float | None, sign: str) -> str:
    scale = 100 if is_share(metric) else 1
    text = f"{scale * value:{sign}.2f}"
    return text if stderr is None else f"{text} ± {scale * stderr:.2f}"
