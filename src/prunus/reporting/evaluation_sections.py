"""Files of `prunus eval --json` and `prunus bench --json` as sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunus.reporting.document import Bars, Column, Facts, Measured, Section, Table
from prunus.reporting.size_charts import Result, decode_speed, size_charts

__all__ = [
    "decode_speeds",
    "evaluation_section",
    "form_of",
    "is_share",
    "short_names",
    "speed_section",
]

#: Metrics of lm-eval that are shares of the rows.
_SHARES = ("acc", "exact_match", "f1", "em")


def evaluation_section(
    content: dict[str, Any], speeds: Mapping[str, float] | None = None
) -> Section:
    """The section of an evaluation: models side by side, with the differences to the first.

    Args:
        content: what `prunus eval --json` wrote.
        speeds: of `decode_speeds`.

    Raises:
        ValueError: `content` is something else.
    """
    try:
        names = short_names([one["model"] for one in content["models"]])
        parts = [
            *_perplexity(content["models"], names),
            *_sizes(content["models"], names, speeds or {}),
            *_tasks(content, names),
        ]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"this is not the JSON of prunus eval: {error!r}") from None
    return Section("Evaluation of " + ", ".join(names.values()), parts=tuple(parts))


def short_names(models: Sequence[str]) -> dict[str, str]:
    """The last part of each model's path or hub id, if these parts differ; else the whole names.

    >>> short_names(["runs/dense", "runs/pruned"])
    {'runs/dense': 'dense', 'runs/pruned': 'pruned'}
    >>> short_names(["a/model", "b/model"])
    {'a/model': 'a/model', 'b/model': 'b/model'}
    """
    short = {model: Path(model).name or model for model in models}
    return short if len(set(short.values())) == len(models) else {model: model for model in models}


def _perplexity(models: list[dict[str, Any]], names: dict[str, str]) -> list[Any]:
    if not models[0]["perplexity"]:
        return []
    rows = tuple(
        (first["source"], *(one["perplexity"][place]["perplexity"] for one in models))
        for place, first in enumerate(models[0]["perplexity"])
    )
    protocol = {r["source"]: f"{r['protocol']}" for one in models for r in one["perplexity"]}
    columns = (Column("text"), *(Column(names[one["model"]], ",.3f") for one in models))
    return [
        Table("Perplexity", columns, rows, "Lower is better."),
        *_divergence(models, names),
        Facts("Protocol", tuple(protocol.items())),
    ]


def _divergence(models: list[dict[str, Any]], names: dict[str, str]) -> list[Table]:
    """How far the models are from a reference; nothing if there was none."""
    found = [
        (first["source"], names[one["model"]], one["perplexity"][place].get("divergence"))
        for place, first in enumerate(models[0]["perplexity"])
        for one in models
    ]
    rows = tuple(
        (
            text,
            model,
            _with_error(figures, "kl", ".5f"),
            figures["kl_q999"],
            _with_error(figures, "same_top", ".2%"),
            _with_error(figures, "perplexity_ratio", ".4f"),
        )
        for text, model, figures in found
        if figures is not None
    )
    if not rows:
        return []
    columns = (
        Column("text"),
        Column("model"),
        Column("KL divergence", ".5f"),
        Column("its 99.9 % quantile", ".3f"),
        Column("same most likely token", ".2%"),
        Column("perplexity ratio", ".4f"),
    )
    reference = next(figures["reference"] for *_, figures in found if figures is not None)
    note = "KL divergence from the reference in nats per token; ± one standard error over windows."
    return [Table(f"Compared with {Path(reference).name or reference}", columns, rows, note)]


def _with_error(figures: dict[str, Any], name: str, form: str) -> Measured | None:
    value = figures[name]
    return None if value is None else Measured(value, figures[f"{name}_stderr"], form)


def _sizes(
    models: list[dict[str, Any]], names: dict[str, str], speeds: Mapping[str, float]
) -> list[Any]:
    """Sizes of the models, and charts of their quality against size and speed."""
    measured = {}
    for one in models:
        model, size = one["model"], one.get("size") or {}
        nbytes = size.get("file_bytes")
        measured[model] = (
            None if nbytes is None else nbytes / 1e9,
            size.get("bits_per_weight"),
            decode_speed(speeds, model, names[model]),
        )
    if all(figure is None for figures in measured.values() for figure in figures):
        return []
    charts: list[Any] = []
    for place, first in enumerate(models[0]["perplexity"]):
        points, dense = [], None
        for one in models:
            score, name = one["perplexity"][place], names[one["model"]]
            found = score.get("divergence") or {}
            dense = found.get("reference_perplexity", dense)
            points.append(
                Result(name, name, *measured[one["model"]], found.get("kl"), score["perplexity"])
            )
        charts += size_charts(first["source"], points, dense, labelled=True)
    columns = (
        Column("model"),
        Column("file, GB", ",.3f"),
        Column("bits per weight", ".2f"),
        Column("decode, tokens/s", ",.1f"),
    )
    rows = tuple((names[model], *figures) for model, figures in measured.items())
    shown = [
        place
        for place in range(len(columns))
        if place == 0 or any(row[place] is not None for row in rows)
    ]
    sizes = Table(
        "Size",
        tuple(columns[place] for place in shown),
        tuple(tuple(row[place] for place in shown) for row in rows),
        "Bits per weight: of the linears in the blocks, zeros, masks and scales counted.",
    )
    return [sizes, *charts]


def _tasks(content: dict[str, Any], names: dict[str, str]) -> list[Any]:
    """Accuracies of all models, and the differences of the others to the first."""
    models = [one for one in content["models"] if one["tasks"] is not None]
    if not models:
        return []
    figures = {one["model"]: _figures(one["tasks"]) for one in models}
    keys = list(figures[models[0]["model"]])
    columns = (
        Column("task"),
        Column("metric"),
        *(Column(names[model], ".2%") for model in figures),
    )
    rows = tuple((*key, *(found.get(key) for found in figures.values())) for key in keys)
    protocol = models[0]["tasks"]["protocol"]
    shown = {key: str(value) for key, value in protocol.items() if key != "versions"} | protocol[
        "versions"
    ]
    parts: list[Any] = [
        Table("Tasks", columns, rows, "± one standard error."),
        Facts("Protocol of the tasks", tuple(shown.items())),
    ]
    changes = tuple(
        (
            names[change["model"]],
            change["task"],
            change["metric"],
            Measured(change["value"], change["stderr"], "+" + form_of(change["metric"])),
            "yes" if change["beyond_two_standard_errors"] else "no",
        )
        for change in content["differences"]
    )
    if changes:
        titles = (
            Column("model"),
            Column("task"),
            Column("metric"),
            Column("difference", "+.2%"),
            Column("beyond chance"),
        )
        note = "Beyond chance: more than two standard errors of the difference."
        parts.insert(
            1, Table(f"Differences to {next(iter(names.values()))}", titles, changes, note)
        )
    return parts


def _figures(tasks: dict[str, Any]) -> dict[tuple[str, str], Measured | None]:
    found = {
        (task["task"], metric): _measured(metric, figure)
        for task in tasks["tasks"]
        for metric, figure in task["metrics"].items()
    }
    mean = tasks["paper7_mean_acc"]
    return found if mean is None else found | {("mean of paper7", "acc"): _measured("acc", mean)}


def _measured(metric: str, figure: dict[str, float | None]) -> Measured | None:
    value = figure["value"]
    return None if value is None else Measured(value, figure["stderr"], form_of(metric))


def is_share(metric: str) -> bool:
    """Whether a metric of lm-eval is a share of the rows, such as `acc` or `acc_norm`.

    >>> is_share("acc_norm"), is_share("perplexity")
    (True, False)
    """
    return metric.partition(" ")[0].partition("_norm")[0] in _SHARES


def form_of(metric: str) -> str:
    """Format specification of a metric: shares in percent, all others as they are."""
    return ".2%" if is_share(metric) else ".4g"


def decode_speeds(content: list[dict[str, Any]]) -> dict[str, float]:
    """Model -> median decoding speed in tokens per second.

    Args:
        content: what `prunus bench --json` wrote.
    """
    return {row["model"]: row["decode_tokens_per_second"][1] for row in content}


def speed_section(content: list[dict[str, Any]]) -> Section:
    """The section of a benchmark: size and speed of models side by side.

    Args:
        content: what `prunus bench --json` wrote.

    Raises:
        ValueError: `content` is something else.
    """
    try:
        found = [
            (
                Path(row["model"]).name or row["model"],
                row["file_bytes"] / 1e9,
                *(
                    tuple(row[key])
                    for key in (
                        "resident_bytes",
                        "prefill_tokens_per_second",
                        "decode_tokens_per_second",
                    )
                ),
            )
            for row in content
        ]
        rows = tuple(
            (name, size, resident[1] / 1e9, prefill[1], decode[1], decode[1] / found[0][4][1])
            for name, size, resident, prefill, decode in found
        )
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"this is not the JSON of prunus bench: {error!r}") from None
    columns = (
        Column("model"),
        Column("file, GB", ",.3f"),
        Column("resident, GB", ",.2f"),
        Column("prefill, tokens/s", ",.1f"),
        Column("decode, tokens/s", ",.1f"),
        Column("decode / first", ".2f"),
    )
    sizes = Bars(
        "Size on disk", "GB", tuple((name, size, size, size) for name, size, *_ in found), ",.3f"
    )
    speeds = Bars(
        "Decoding speed",
        "tokens per second: median, lowest and highest",
        tuple((name, decode[1], decode[0], decode[2]) for name, *_, decode in found),
        ",.1f",
    )
    return Section(
        "Size and speed",
        parts=(sizes, speeds, Table("Medians over separate processes", columns, rows)),
    )
