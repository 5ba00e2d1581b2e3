"""Scores of a model on tasks, with standard errors. This file knows neither models nor lm-eval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, PlainSerializer
from pydantic.dataclasses import dataclass

from prunus.evaluation.records import Error, EvaluationRecord, finite
from prunus.runs.document import Column, Table

#: The zero-shot tasks of the Wanda paper (its section 4.1), in the order of its tables.
PAPER7 = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
#: The name of the mean over these tasks in tables and comparisons.
MEAN = "mean of paper7"


@dataclass(frozen=True)
class Metric(EvaluationRecord):
    """One metric of one task.

    Attributes:
        value: the value as lm-eval aggregates it. An accuracy is a share in [0, 1].
        stderr: the standard error of the value. None for a single row, or a metric without a
            formula.
        outcomes: what each row contributes, in the order of the rows. None if the value is not
            their mean.
    """

    value: Annotated[float, PlainSerializer(finite, return_type=float | None)]
    stderr: Error
    outcomes: Annotated[tuple[float, ...] | None, Field(exclude=True)] = None


@dataclass(frozen=True)
class TaskScore(EvaluationRecord):
    """The score of one model on one task, or on one group of tasks.

    Attributes:
        task: lm-eval's name of the task.
        metrics: name -> metric. Multiple-choice tasks have `acc` and `acc_norm`.
        shots: number of worked examples in each prompt.
        rows: number of rows that were scored.
        version: lm-eval's version of the task.
        definition: SHA-256 of everything that makes the prompts and the scoring, rows included.
        source: where the rows come from.
        seconds: time of scoring.
    """

    task: str
    metrics: dict[str, Metric]
    shots: int
    rows: int
    version: str
    definition: str
    source: str
    seconds: float


@dataclass(frozen=True)
class TaskResults:
    """The scores of one model on all tasks.

    Attributes:
        model: name of the model.
        scores: one per task.
        protocol: dtype, batch, device and versions. Show them next to every score.
    """

    model: str
    scores: tuple[TaskScore, ...]
    protocol: dict[str, Any]

    def metrics(self) -> dict[tuple[str, str], Metric]:
        """(task, metric) -> value, in the order of the tasks; a mean of paper7 comes last."""
        found = {
            (score.task, name): metric
            for score in self.scores
            for name, metric in score.metrics.items()
        }
        mean = paper_mean(self.scores)
        return found if mean is None else found | {(MEAN, "acc"): mean}

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
        columns = (
            Column("task"),
            Column("metric"),
            Column("value", ".4f"),
            Column("standard error", ".4f"),
        )
        note = ", ".join(f"{key} {value}" for key, value in self.protocol.items())
        return Table(self.model, columns, tuple(rows), note)._repr_html_()


def paper_mean(scores: Sequence[TaskScore]) -> Metric | None:
    """The unweighted mean of `acc` over the paper's seven tasks, or None if a task is missing.

    The paper reports acc for all tasks, not acc_norm: its 59.99 for dense LLaMA-7B is the mean of
    75.05, 66.43, 56.92, 69.93, 75.34, 41.89 and 34.40.

    >>> scores = [
    ...     TaskScore(task, {"acc": Metric(value / 100, 0.01)}, 0, 100, "1", "", "", 1.0)
    ...     for task, value in zip(PAPER7, (75.05, 66.43, 56.92, 69.93, 75.34, 41.89, 34.40))
    ... ]
    >>> mean = paper_mean(scores)
    >>> round(100 * mean.value, 2), round(100 * mean.stderr, 2)
    (59.99, 0.38)
    >>> paper_mean(scores[:6]) is None
    True
    """
    by_name = {score.task: score.metrics.get("acc") for score in scores}
    found = [metric for task in PAPER7 if (metric := by_name.get(task)) is not None]
    if len(found) < len(PAPER7):
        return None
    return Metric(*mean_of_tasks([(metric.value, metric.stderr) for metric in found]))


def mean_of_tasks(
    figures: Sequence[tuple[float, float | None]],
) -> tuple[float, float | None]:
    """The mean of n (value, standard error) pairs, and its error √(Σ s²) / n.

    Tasks have different rows, so their errors are independent. One unknown error makes that of the
    mean unknown.
    """
    count = len(figures)
    errors = [stderr for _, stderr in figures if stderr is not None]
    stderr = math.hypot(*errors) / count if len(errors) == count else None
    return sum(value for value, _ in figures) / count, stderr


def paired_difference(first: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """The mean of d = other − first, taken row by row, and its standard error sd(d) / √n.

    sd is the sample standard deviation, which divides by n − 1. For a single row the error is NaN.

    >>> paired_difference([1, 1, 0, 0], [1, 0, 0, 0])
    (-0.25, 0.25)
    """
    steps = [b - a for a, b in zip(first, other, strict=True)]
    error = statistics.stdev(steps) / math.sqrt(len(steps)) if len(steps) > 1 else math.nan
    return statistics.fmean(steps), error
