"""What judging a model on tasks gives: figures with standard errors. Knows neither models nor lm-eval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "MEAN",
    "PAPER7",
    "Metric",
    "TaskResults",
    "TaskScore",
    "paired_difference",
    "paper_mean",
]

#: The zero-shot tasks of the Wanda paper (its section 4.1), in the order of its tables.
PAPER7 = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
#: What the mean over these tasks is called in tables and comparisons.
MEAN = "mean of paper7"


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        value: as lm-eval aggregates it; an accuracy is a share in [0, 1].
        stderr: its standard error, None where there is none (one row, a metric without a formula).
        outcomes: what each row contributed, in the order of the rows; None where the value is not their mean.
    """

    value: float
    stderr: float | None
    outcomes: tuple[float, ...] | None = None

    def as_dict(self) -> dict[str, float | None]:
        """Value and standard error as plain values; NaN and infinity, which JSON does not know, become None."""
        return {"value": _finite(self.value), "stderr": _finite(self.stderr)}


@dataclass(frozen=True)
class TaskScore:
    """One task (or group of tasks) and one model.

    Attributes:
        task: lm-eval's name.
        metrics: metric -> figure; `acc` and `acc_norm` for the multiple-choice tasks.
        shots: worked examples in each prompt.
        rows: how many were scored.
        version: lm-eval's, of the task.
        definition: SHA-256 over everything that makes the prompts and the scoring, rows included.
        source: where the rows came from.
        seconds: of scoring; what it took when it was computed, if it is cached.
        cached: whether it was computed earlier.
    """

    task: str
    metrics: dict[str, Metric]
    shots: int
    rows: int
    version: str
    definition: str
    source: str
    seconds: float
    cached: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it, without the single rows."""
        plain = {key: value for key, value in vars(self).items() if key != "metrics"}
        return plain | {
            "metrics": {name: metric.as_dict() for name, metric in self.metrics.items()}
        }


@dataclass(frozen=True)
class TaskResults:
    """One model on all tasks. `protocol`: dtype, batch, limit and versions, which belong beside every figure."""

    model: str
    scores: tuple[TaskScore, ...]
    protocol: dict[str, Any]

    def figures(self) -> dict[tuple[str, str], Metric]:
        """(task, metric) -> figure, in the order of the tasks; then the paper's mean where it can be had."""
        found = {
            (score.task, name): metric
            for score in self.scores
            for name, metric in score.metrics.items()
        }
        mean = paper_mean(self.scores)
        return found if mean is None else found | {(MEAN, "acc"): mean}

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        mean = paper_mean(self.scores)
        return {
            "model": self.model,
            "tasks": [score.as_dict() for score in self.scores],
            "paper7_mean_acc": None if mean is None else mean.as_dict(),
            "protocol": self.protocol,
        }


def paper_mean(scores: Sequence[TaskScore]) -> Metric | None:
    """The unweighted mean of `acc` over the paper's seven tasks, None unless all are there.

    The paper reports acc throughout, not acc_norm: its 59.99 for dense LLaMA-7B is the mean of 75.05, 66.43, 56.92,
    69.93, 75.34, 41.89 and 34.40. Standard error: √(Σ s²)/7, the tasks' rows being independent.
    """
    by_name = {score.task: score.metrics.get("acc") for score in scores}
    found = [metric for task in PAPER7 if (metric := by_name.get(task)) is not None]
    if len(found) < len(PAPER7):
        return None
    errors = [metric.stderr for metric in found if metric.stderr is not None]
    stderr = math.hypot(*errors) / len(PAPER7) if len(errors) == len(PAPER7) else None
    return Metric(sum(metric.value for metric in found) / len(PAPER7), stderr)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def paired_difference(first: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """The mean of other − first, row by row, and its standard error (sample variance, n - 1; nan of a single row)."""
    steps = [b - a for a, b in zip(first, other, strict=True)]
    error = statistics.stdev(steps) / math.sqrt(len(steps)) if len(steps) > 1 else math.nan
    return statistics.fmean(steps), error
