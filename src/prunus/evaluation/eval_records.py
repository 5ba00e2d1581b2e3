"""Results of evaluation as records, and the differences between models, without torch.

All models answer the same rows, so we subtract row by row. Let d_i be the difference of two models'
outcomes on row i of n. The difference of their means is the mean of d, and its standard error is

    se(d) = sd(d) / √n,   sd(d)² = Σ (d_i − mean(d))² / (n − 1).

This paired error is smaller than √(s₁² + s₂²), the error for independent samples, because two
models mostly fail on the same rows. The independent error is used only where the outcomes of single
rows are unknown.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, TypeAdapter
from pydantic.dataclasses import dataclass

from prunus.document import Best, Column, Measured, Table, text_of
from prunus.evaluation.metrics import METRICS, TextMetric


def finite(value: float | None) -> float | None:
    """A value for JSON, which has neither infinity nor NaN: it has None in their place.

    >>> finite(0.5), finite(math.inf)
    (0.5, None)
    """
    return value if value is not None and math.isfinite(value) else None


#: A number that may be infinite. JSON has None in its place.
Figure = Annotated[
    float,
    PlainSerializer(finite, return_type=float | None),
    BeforeValidator(lambda value: math.inf if value is None else value),
]
#: A standard error, or None where it is unknown.
Error = Annotated[float | None, PlainSerializer(finite, return_type=float | None)]
# A file with an unknown field is of another version, and is refused.
_STRICT = ConfigDict(extra="forbid")
#: The zero-shot tasks of the Wanda paper (its section 4.1), in the order of its tables.
PAPER7 = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
#: What the result over all texts has as its source.
ALL_TEXTS = "all texts"
#: Title of a column of a table -> format of its figures.
FORMS = {
    "perplexity": ",.3f",
    "residual gap": ".3f",
    **{metric.title: metric.form for metric in METRICS},
    "file, GB": ",.3f",
    "bits per weight": ".2f",
}
#: Title of a column in which results compete -> which figure is the best one.
BEST: dict[str, Best] = {
    "perplexity": "lowest",
    "residual gap": "lowest",
    "KL divergence": "lowest",
    "same top token": "highest",
}
#: The metrics with their units, for the notes of tables.
UNITS = ", ".join(f"{metric.title} ({metric.unit})" for metric in METRICS if not metric.of_tokens)


class EvaluationRecord:
    """A record that can be written as JSON."""

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON."""
        fields: dict[str, Any] = TypeAdapter(type(self)).dump_python(self, mode="json")
        return fields


@dataclass(frozen=True, config=_STRICT)
class WorstToken(EvaluationRecord):
    """Where the predictions of a model are farthest from those of the reference.

    Attributes:
        source: The text.
        window: Number of the window in the text, from 0.
        token: Position of the predicted token in the window, from 0.
        before: The end of the text before it; None for a text of token ids.
        text: The token as text; None for a text of token ids.
    """

    source: str
    window: int
    token: int
    before: str | None
    text: str | None

    def __str__(self) -> str:
        place = f"window {self.window}, token {self.token}"
        return place if self.text is None else f"{place}: {self.before!r} → {self.text!r}"


@dataclass(frozen=True, config=_STRICT)
class Divergence(EvaluationRecord):
    """How far the predictions of a model are from those of a reference, on the same tokens.

    The fields are the metrics of `METRICS`, each with its standard error, if it has one. Standard
    errors are over windows; they are None for a single window.

    Attributes:
        reference: Name of the reference.
        kl: Mean of KL(reference ‖ model), in nats per token.
        kl_stderr: Standard error of `kl`.
        kl_q999: The 99.9 % quantile of the KL divergences of all tokens, in nats.
        same_top: Share of tokens for which both models find the same next token most likely.
        same_top_stderr: Standard error of `same_top`.
        reference_perplexity: Perplexity of the reference on the same tokens.
        perplexity_ratio: Perplexity of the model, divided by that of the reference.
        perplexity_ratio_stderr: Standard error of the ratio, from losses paired by window.
        kl_median: The median of the KL divergences of all tokens, in nats.
        kl_q99: Their 99 % quantile.
        kl_max: The largest of them.
        kl_max_at: Where that is. The last four are None in files of earlier versions.
    """

    reference: str
    kl: float
    kl_stderr: Error
    kl_q999: float
    same_top: float
    same_top_stderr: Error
    reference_perplexity: Figure
    perplexity_ratio: Figure
    perplexity_ratio_stderr: Error
    kl_median: float | None = None
    kl_q99: float | None = None
    kl_max: float | None = None
    kl_max_at: WorstToken | None = None

    def figures(self, of_tokens: bool) -> dict[str, Measured | float | None]:
        """Title of a metric -> its figure: those of single tokens, or the others."""
        return {x.title: self._figure(x) for x in METRICS if x.of_tokens == of_tokens}

    def _figure(self, metric: TextMetric) -> Measured | float | None:
        """The figure of a metric, with its standard error if it has one; None if it is infinite."""
        value = finite(getattr(self, metric.name))
        error = f"{metric.name}_stderr"
        if value is None or not hasattr(self, error):
            return value
        return Measured(value, getattr(self, error))


@dataclass(frozen=True, config=_STRICT)
class PerplexityResult(EvaluationRecord):
    """The perplexity of a model on a text, and how it was measured.

    Attributes:
        source: Where the text comes from.
        perplexity: exp(loss), or infinity if that does not fit in a float.
        loss: Mean cross entropy in nats per token.
        windows: Number of windows that were scored.
        tokens: windows · seqlen.
        seqlen: Tokens per window.
        protocol: Text, windows and dtype in words.
        seconds: Time of scoring alone, without loading, of all models that were side by side.
        streamed: Whether the model was read block by block. The perplexity does not depend on it.
        bos: Whether every window begins with BOS: "yes", "no", or "given" for a file of token ids.
        windows_sha256: SHA-256 of the token ids of the windows, see `hash_ids`. It tells texts,
            tokenizers and windows apart. None in files of earlier versions.
        divergence: How far the model is from a reference; None without a reference.
        by_window: Name of a figure -> its mean over each window, to compare models window by
            window. Not in the JSON, and empty without a reference.
    """

    source: str
    perplexity: Figure
    loss: float
    windows: int
    tokens: int
    seqlen: int
    protocol: str
    seconds: float
    streamed: bool = False
    bos: Literal["yes", "no", "given"] = "no"
    windows_sha256: str | None = None
    divergence: Divergence | None = None
    by_window: Annotated[dict[str, tuple[float, ...]], Field(exclude=True)] = field(
        default_factory=dict, compare=False
    )

    def figures(self) -> dict[str, Any]:
        """The figures of a row of a table, without infinite ones; `FORMS` has their formats."""
        figures: dict[str, Any] = {"perplexity": finite(self.perplexity)}
        if self.divergence is not None:
            figures |= self.divergence.figures(of_tokens=False)
        return figures

    @property
    def measured_on(self) -> str:
        """The protocol, with the beginning of the hash of the windows."""
        sha256 = self.windows_sha256
        return self.protocol if sha256 is None else f"{self.protocol} (sha256 {sha256[:12]})"

    def token_figures(self) -> dict[str, Any]:
        """The figures of single tokens, and where the largest KL is; empty without a reference."""
        if self.divergence is None:
            return {}
        place = self.divergence.kl_max_at
        at = {"at": None if place is None else str(place)}
        return self.divergence.figures(of_tokens=True) | at

    def _repr_html_(self) -> str:
        """The figures as a table in a notebook."""
        every = self.figures() | self.token_figures()
        figures = {name: text_of(value, FORMS.get(name)) for name, value in every.items()}
        windows = f"{self.windows:,} of {self.seqlen:,} tokens"
        rows = figures | {"windows": windows, "seconds": f"{self.seconds:.1f}"}
        columns = (Column("measure"), Column("value"))
        note = self.protocol
        if self.divergence is not None:
            note += f"\nCompared with {self.divergence.reference}: {UNITS}"
        return Table(self.source, columns, tuple(rows.items()), note)._repr_html_()


@dataclass(frozen=True, config=_STRICT)
class ModelSize(EvaluationRecord):
    """The size of a model as it is stored."""

    #: Bytes of its safetensors or of its GGUF file. Those of an adapter include its base.
    file_bytes: int
    #: Bits of the linears in the blocks, all their parts counted, over their number of weights,
    #: zeros counted. None where the linears are not known, as for an adapter.
    bits_per_weight: float | None

    def figures(self) -> dict[str, Any]:
        """The figures of a row of a table; `FORMS` has their formats."""
        return {"file, GB": self.file_bytes / 1e9, "bits per weight": self.bits_per_weight}


# --- tasks ---


@dataclass(frozen=True)
class Metric:
    """The value of one metric on one task."""

    #: The value as lm-eval aggregates it. An accuracy is a share in [0, 1].
    value: float
    #: The standard error of the value. None for a single row, or a metric without a formula.
    stderr: float | None
    #: What each row contributes, in the order of the rows. None if the value is not their mean, or
    #: the rows are unknown.
    outcomes: tuple[float, ...] | None = None


def task_metrics(results: Mapping[str, Any]) -> dict[tuple[str, str], Metric]:
    """(task, metric) -> value, from the content of lm-eval's file of results.

    lm-eval's keys are `metric,filter` and `metric_stderr,filter`; "N/A" is an unknown error.

    >>> values = {"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": "rte"}
    >>> task_metrics({"results": {"rte": values}})
    {('rte', 'acc'): Metric(value=0.5, stderr=None, outcomes=None)}
    """
    metrics = {}
    for task, values in results["results"].items():
        rows = results.get("samples", {}).get(task, ())
        for key, value in values.items():
            name, comma, kind = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{name}_stderr,{kind}")
            outcomes = [row.get(name) for row in rows if row["filter"] == kind]
            # The value may be another figure than the mean of the rows, such as a perplexity.
            is_mean = (
                outcomes
                and all(isinstance(outcome, int | float) for outcome in outcomes)
                and math.isclose(statistics.fmean(outcomes), value, abs_tol=1e-9)
            )
            metrics[task, name if kind == "none" else f"{name} ({kind})"] = Metric(
                float(value),
                float(error) if isinstance(error, int | float) else None,
                tuple(map(float, outcomes)) if is_mean else None,
            )
    return metrics


@dataclass(frozen=True)
class Difference(EvaluationRecord):
    """The value of one metric for a model, minus the value for another one.

    >>> Difference("pruned", "rte", "acc", value=-0.05, stderr=0.02, paired=True).significant
    True
    """

    #: The model.
    model: str
    #: Name of the task, or the text.
    task: str
    #: Name of the metric.
    metric: str
    #: The difference, in the unit of the metric.
    value: float
    #: Standard error of the difference; None if it is unknown.
    stderr: float | None
    #: Whether the difference was taken row by row, or window by window.
    paired: bool
    #: The model that it is compared with; empty for the first one.
    than: str = ""

    @property
    def significant(self) -> bool:
        """Whether the difference exceeds two standard errors; False if the error is unknown."""
        return self.stderr is not None and abs(self.value) > 2 * self.stderr

    def as_dict(self) -> dict[str, Any]:
        """The fields and the significance as plain values for JSON."""
        return super().as_dict() | {"beyond_two_standard_errors": self.significant}


def compare(results: Mapping[str, Mapping[str, Any]]) -> list[Difference]:
    """Compare every model with the first one, metric by metric.

    >>> def scored(*outcomes):
    ...     rows = [{"filter": "none", "acc": outcome} for outcome in outcomes]
    ...     values = {"acc,none": sum(outcomes) / len(outcomes)}
    ...     return {"results": {"rte": values}, "samples": {"rte": rows}}
    >>> [change] = compare({"dense": scored(1, 1, 1, 0), "pruned": scored(1, 0, 1, 0)})
    >>> change.value, change.stderr, change.paired
    (-0.25, 0.25, True)

    Args:
        results: Name of a model -> what `evaluate` returns, or the content of lm-eval's file of
            results, which lacks the rows.

    Returns:
        The differences, model by model. The error of the mean over the paper's seven tasks is taken
        from those of the tasks.

    Raises:
        ValueError: A task had other rows, prompts or examples for two models.
    """
    differences = []
    for other in list(results)[1:]:
        first = next(iter(results))
        hashes, others = (results[name].get("task_hashes", {}) for name in (first, other))
        for task in hashes.keys() & others.keys():
            if hashes[task] != others[task]:
                raise ValueError(
                    f"{task} was not the same for {first} and {other}: other rows, prompts or "
                    "examples; evaluate both again with the same options"
                )
        before, after = task_metrics(results[first]), task_metrics(results[other])
        changes = {key: _difference(before[key], after[key]) for key in before if key in after}
        if ("paper7", "acc") in changes:
            values, errors, paired = zip(*(changes[task, "acc"] for task in PAPER7), strict=True)
            error = None if None in errors else math.hypot(*errors) / len(PAPER7)
            changes["paper7", "acc"] = (statistics.fmean(values), error, all(paired))
        for (task, metric), change in changes.items():
            differences.append(Difference(other, task, metric, *change))
    return differences


def compare_on_texts(
    perplexities: Mapping[str, Sequence[PerplexityResult]],
) -> list[Difference]:
    """Compare every two models that were scored side by side, text by text and window by window.

    A metric is a name of `PerplexityResult.by_window`, such as `kl`.

    Args:
        perplexities: Name of every model -> its results on the same texts.

    Returns:
        The differences, pair by pair; none where models were not scored side by side.
    """
    return [
        Difference(other, result.source, name, *_difference(*pair), than=first)
        for first, other in itertools.combinations(perplexities, 2)
        for before, result in zip(perplexities[first], perplexities[other], strict=True)
        for name in result.by_window
        for pair in [
            [
                Metric(statistics.fmean(means), None, means)
                for means in (before.by_window[name], result.by_window[name])
            ]
        ]
    ]


def _difference(first: Metric, other: Metric) -> tuple[float, float | None, bool]:
    """other − first, its standard error (None if unknown), and whether it is paired."""
    value = other.value - first.value
    if first.outcomes is not None and other.outcomes is not None and len(first.outcomes) > 1:
        steps = [b - a for a, b in zip(first.outcomes, other.outcomes, strict=True)]
        return value, statistics.stdev(steps) / math.sqrt(len(steps)), True
    if first.stderr is None or other.stderr is None:
        return value, None, False
    return value, math.hypot(first.stderr, other.stderr), False


def side_by_side(
    perplexities: Mapping[str, Sequence[PerplexityResult]],
    results: Mapping[str, Mapping[str, Any]],
    sizes: Mapping[str, ModelSize],
    reference: str | None = None,
) -> dict[str, Any]:
    """What `prunus eval --json` writes: the results of every model, and their differences.

    Args:
        perplexities: Name of every model -> its perplexities, which may be none.
        results: Name of a model -> its results on tasks; may be empty.
        sizes: Name of a model -> its size, where that is known.
        reference: Name of the model that the others are compared with, or None.
    """
    size_of = {model: size.as_dict() for model, size in sizes.items()}
    dense = reference and {"model": reference, "size": size_of.get(reference)}
    # lm-eval's file of results has no rows.
    on_tasks = {
        model: {key: value for key, value in result.items() if key != "samples"}
        for model, result in results.items()
    }
    return {
        "reference": dense,
        "models": [
            {
                "model": model,
                "size": size_of.get(model),
                "perplexity": [result.as_dict() for result in of_model],
                "tasks": on_tasks.get(model),
            }
            for model, of_model in perplexities.items()
        ],
        "differences": [change.as_dict() for change in compare(results)],
        "text_differences": [change.as_dict() for change in compare_on_texts(perplexities)],
    }
