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
#: The name of the mean over these tasks in tables and comparisons.
MEAN = "mean of paper7"
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
class Metric(EvaluationRecord):
    """The value of one metric on one task."""

    #: The value as lm-eval aggregates it. An accuracy is a share in [0, 1].
    value: Figure
    #: The standard error of the value. None for a single row, or a metric without a formula.
    stderr: Error
    #: What each row contributes, in the order of the rows. None if the value is not their mean.
    outcomes: Annotated[tuple[float, ...] | None, Field(exclude=True)] = None


@dataclass(frozen=True)
class TaskScore(EvaluationRecord):
    """The score of one model on one task, or on one group of tasks."""

    #: Name of the task or group in lm-eval.
    task: str
    #: Name -> metric. Multiple-choice tasks have `acc` and `acc_norm`.
    metrics: dict[str, Metric]
    #: Number of worked examples in each prompt.
    shots: int
    #: Number of rows that were scored.
    rows: int
    #: lm-eval's version of the task.
    version: str
    #: SHA-256 of everything that makes the prompts and the scoring, rows included.
    definition: str
    #: Where the rows come from.
    source: str
    #: Time of scoring.
    seconds: float


@dataclass(frozen=True)
class TaskResults:
    """The scores of one model on all tasks."""

    #: Name of the model.
    model: str
    #: The scores, in the order of the tasks.
    scores: tuple[TaskScore, ...]
    #: How the model was computed: dtype, batch, hardware and versions.
    protocol: dict[str, Any]

    def metrics(self) -> dict[tuple[str, str], Metric]:
        """(task, metric) -> value, in the order of the tasks; a mean of paper7 comes last."""
        metrics = {
            (score.task, name): metric
            for score in self.scores
            for name, metric in score.metrics.items()
        }
        mean = paper_mean(self.scores)
        return metrics if mean is None else metrics | {(MEAN, "acc"): mean}

    def as_dict(self) -> dict[str, Any]:
        """The results as plain values for JSON."""
        mean = paper_mean(self.scores)
        return {
            "model": self.model,
            "tasks": [score.as_dict() for score in self.scores],
            "paper7_mean_acc": None if mean is None else mean.as_dict(),
            "protocol": self.protocol,
        }

    def _repr_html_(self) -> str:
        """The scores as a table in a notebook."""
        rows = [(*key, metric.value, metric.stderr) for key, metric in self.metrics().items()]
        texts, numbers = ("task", "metric"), ("value", "standard error")
        columns = (*map(Column, texts), *(Column(title, ".4f") for title in numbers))
        note = ", ".join(f"{key} {value}" for key, value in self.protocol.items())
        return Table(self.model, columns, tuple(rows), note)._repr_html_()


def paper_mean(scores: Sequence[TaskScore]) -> Metric | None:
    """The unweighted mean of `acc` over the paper's seven tasks, or None if a task is missing.

    The paper reports acc for all tasks, not acc_norm: its 59.99 for dense LLaMA-7B is the mean of
    75.05, 66.43, 56.92, 69.93, 75.34, 41.89 and 34.40.
    """
    by_name = {score.task: score.metrics.get("acc") for score in scores}
    metrics = [metric for task in PAPER7 if (metric := by_name.get(task)) is not None]
    if len(metrics) < len(PAPER7):
        return None
    return Metric(*_mean_of_tasks([(metric.value, metric.stderr) for metric in metrics]))


def _mean_of_tasks(figures: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    """The mean of n independent tasks (value, standard error), and its error √(Σ s²) / n.

    The error is None if that of a task is unknown.

    >>> _mean_of_tasks([(0.5, 0.03), (0.7, 0.04)]), _mean_of_tasks([(0.5, None)])
    ((0.6, 0.025), (0.5, None))
    """
    count = len(figures)
    errors = [stderr for _, stderr in figures if stderr is not None]
    stderr = math.hypot(*errors) / count if len(errors) == count else None
    return sum(value for value, _ in figures) / count, stderr


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


def compare(results: Sequence[TaskResults]) -> list[Difference]:
    """Compare every model to the first one, metric by metric.

    >>> def scored(model, *outcomes):
    ...     metrics = {"acc": Metric(sum(outcomes) / len(outcomes), None, outcomes)}
    ...     return TaskResults(model, (TaskScore("rte", metrics, 0, 4, "1", "", "", 1.0),), {})
    >>> [change] = compare([scored("dense", 1, 1, 1, 0), scored("pruned", 1, 0, 1, 0)])
    >>> change.value, change.stderr, change.paired
    (-0.25, 0.25, True)

    Returns:
        The differences, model by model. The mean over the paper's seven tasks comes last.

    Raises:
        ValueError: A task had other rows, prompts or examples for two models.
    """
    differences = []
    for other in results[1:]:
        definitions = {score.task: score.definition for score in results[0].scores}
        for score in other.scores:
            if definitions.get(score.task, score.definition) != score.definition:
                raise ValueError(
                    f"{score.task} was not the same for {results[0].model} and {other.model}: "
                    "other rows, prompts or examples; evaluate both again with the same options"
                )
        before, after = results[0].metrics(), other.metrics()
        changes = {
            key: _difference(before[key], after[key])
            for key in before
            if key in after and key[0] != MEAN
        }
        if (MEAN, "acc") in before and (MEAN, "acc") in after:
            parts = [changes[task, "acc"] for task in PAPER7]
            mean = _mean_of_tasks([part[:2] for part in parts])
            changes[MEAN, "acc"] = (*mean, all(paired for _, _, paired in parts))
        for (task, metric), (value, stderr, paired) in changes.items():
            differences.append(Difference(other.model, task, metric, value, stderr, paired))
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
    results: Sequence[TaskResults],
    sizes: Mapping[str, ModelSize],
    reference: str | None = None,
) -> dict[str, Any]:
    """What `prunus eval --json` writes: the results of every model, and their differences.

    Args:
        perplexities: Name of every model -> its perplexities, which may be none.
        results: The results on tasks of the same models; may be empty.
        sizes: Name of a model -> its size, where that is known.
        reference: Name of the model that the others are compared with, or None.
    """
    on_tasks = {result.model: result.as_dict() for result in results}
    size_of = {model: size.as_dict() for model, size in sizes.items()}
    dense = reference and {"model": reference, "size": size_of.get(reference)}
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
