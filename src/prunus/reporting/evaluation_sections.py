"""What `prunus eval --json` and `prunus bench --json` write, as sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunus.evaluation.records import FORMS, PerplexityResult, finite
from prunus.reporting.quality import Point, decode_speed, quality_charts
from prunus.runs.document import (
    Column,
    Facts,
    Measured,
    Section,
    Table,
    items_of,
    short_names,
    table_of,
)

#: Metrics of lm-eval that are shares of the rows.
_SHARES = ("acc", "exact_match", "f1", "em")


def evaluation_section(
    content: dict[str, Any], speeds: Mapping[str, float] | None = None
) -> Section:
    """The section of an evaluation: quality, size and speed, then tasks."""
    try:
        models = content["models"]
        names = short_names([one["model"] for one in models])
        scores = {
            one["model"]: [PerplexityResult(**score) for score in one["perplexity"]]
            for one in models
        }
        sizes = {one["model"]: _size(one, names, speeds or {}) for one in models}
        parts = [*_quality(scores, sizes, names), *_tasks(content, names)]
        protocols = {score.source: score.protocol for found in scores.values() for score in found}
        details = [Facts("Protocol", tuple(protocols.items()))] if protocols else []
        details += _task_protocol(models)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"this is not the JSON of prunus eval: {error!r}") from None
    title = "Evaluation of " + ", ".join(names.values())
    return Section(title, parts=tuple(parts), details=tuple(details))


def _size(one: dict[str, Any], names: dict[str, str], speeds: Mapping[str, float]) -> Any:
    size = one.get("size") or {}
    nbytes = size.get("file_bytes")
    return {
        "file, GB": None if nbytes is None else nbytes / 1e9,
        "bits per weight": size.get("bits_per_weight"),
        "decoded tokens/s": decode_speed(speeds, one["model"], names[one["model"]]),
    }


def _quality(
    scores: Mapping[str, list[PerplexityResult]],
    sizes: Mapping[str, dict[str, Any]],
    names: dict[str, str],
) -> list[Any]:
    """One table of perplexity, divergence, size and speed, and a chart for each text."""
    rows: list[dict[str, Any]] = []
    charts, reference = [], None
    for texts in zip(*scores.values(), strict=True):
        points = []
        for model, score in zip(scores, texts, strict=True):
            figures = score.figures() | sizes[model]
            rows.append({"text": score.source, "model": names[model]} | figures)
            points.append(Point(names[model], names[model], figures))
            if score.divergence is not None:
                reference = score.divergence
        dense = None if reference is None else finite(reference.reference_perplexity)
        charts += quality_charts(texts[0].source, points, dense, labelled=True)
    if not rows:
        rows = [{"model": names[model]} | size for model, size in sizes.items()]
    note = "Lower perplexity is better." if charts or "text" in rows[0] else ""
    if reference is not None:
        name = Path(reference.reference).name or reference.reference
        note += f" KL divergence from {name} in nats per token; ± one standard error over windows."
    if any(size["bits per weight"] is not None for size in sizes.values()):
        note += " Bits per weight: of the linears in the blocks; zeros, masks and scales count."
    table = table_of("Quality and size", rows, FORMS, note.strip())
    return [table, *charts] if len(table.columns) > 1 else charts


def _tasks(content: dict[str, Any], names: dict[str, str]) -> list[Table]:
    """One row per task, metric and model, with the difference to the first model."""
    models = [one for one in content["models"] if one["tasks"] is not None]
    found = {one["model"]: _metrics(one["tasks"]) for one in models}
    changes = {
        (change["model"], change["task"], change["metric"]): change
        for change in content["differences"]
    }
    rows = []
    for key in next(iter(found.values()), ()):
        for model, metrics in found.items():
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


def _metrics(tasks: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """(task, metric) -> its figure, and how many shots and rows it is from."""
    found: dict[tuple[str, str], dict[str, Any]] = {
        (task["task"], metric): {
            "figure": _measured(metric, figure),
            "shots": task["shots"],
            "rows": task["rows"],
        }
        for task in tasks["tasks"]
        for metric, figure in task["metrics"].items()
    }
    mean = tasks["paper7_mean_acc"]
    if mean is not None:
        found["mean of paper7", "acc"] = {"figure": _measured("acc", mean)}
    return found


def _measured(metric: str, figure: dict[str, float | None]) -> Measured | None:
    value = figure["value"]
    return None if value is None else Measured(value, figure["stderr"], form_of(metric))


def _task_protocol(models: Sequence[dict[str, Any]]) -> list[Facts]:
    protocols = [one["tasks"]["protocol"] for one in models if one["tasks"] is not None]
    if not protocols:
        return []
    shown = {key: value for key, value in protocols[0].items() if key != "versions"}
    return [Facts("Protocol of the tasks", items_of(shown | protocols[0]["versions"]))]


def form_of(metric: str) -> str:
    """Format of a metric of lm-eval: shares such as `acc_norm` in percent, others as they are.

    >>> form_of("acc_norm"), form_of("perplexity")
    ('.2%', '.4g')
    """
    share = metric.partition(" ")[0].partition("_norm")[0] in _SHARES
    return ".2%" if share else ".4g"


def decode_speeds(content: list[dict[str, Any]]) -> dict[str, float]:
    """Model -> median decoding speed in tokens per second."""
    return {row["model"]: row["decode_tokens_per_second"][1] for row in content}


def speed_section(content: list[dict[str, Any]]) -> Section:
    """The section of a benchmark: size and speed of models, each a median with its spread."""
    try:
        decode = [row["decode_tokens_per_second"] for row in content]
        rows = tuple(
            (
                Path(row["model"]).name or row["model"],
                row["file_bytes"] / 1e9,
                row["resident_bytes"][1] / 1e9,
                row["prefill_tokens_per_second"][1],
                median,
                low,
                high,
                median / decode[0][1],
            )
            for row, (low, median, high) in zip(content, decode, strict=True)
        )
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"this is not the JSON of prunus bench: {error!r}") from None
    columns = (
        Column("model"),
        Column("file, GB", ",.3f"),
        Column("resident, GB", ",.2f"),
        Column("prefill, tokens/s", ",.1f"),
        Column("decode, tokens/s", ",.1f"),
        Column("lowest", ",.1f"),
        Column("highest", ",.1f"),
        Column("decode / first", ".2f"),
    )
    table = Table("Medians over separate processes", columns, rows)
    return Section("Size and speed", parts=(table,))
