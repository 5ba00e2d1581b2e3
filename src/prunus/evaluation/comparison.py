"""Differences between models, with their standard errors.

All models answer the same rows, so we subtract row by row. Let d_i be the difference of two models'
outcomes on row i of n. The difference of their means is the mean of d, and its standard error is

    se(d) = sd(d) / √n,   sd(d)² = Σ (d_i − mean(d))² / (n − 1).

This paired error is smaller than √(s₁² + s₂²), the error for independent samples, because two
models mostly fail on the same rows. The independent error is used only where the outcomes of single
rows are unknown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.dataclasses import dataclass

from prunus.evaluation.records import EvaluationRecord, ModelSize, PerplexityResult
from prunus.evaluation.task_scores import (
    MEAN,
    PAPER7,
    Metric,
    TaskResults,
    mean_of_tasks,
    paired_difference,
)


@dataclass(frozen=True)
class Difference(EvaluationRecord):
    """The value of one metric for a model, minus the value for the first model.

    >>> Difference("pruned", "rte", "acc", value=-0.05, stderr=0.02, paired=True).significant
    True

    Attributes:
        model: the model that is compared to the first one.
        task: name of the task.
        metric: name of the metric.
        value: the difference, in the unit of the metric.
        stderr: standard error of the difference, or None if it is unknown.
        paired: whether the difference was taken row by row.
    """

    model: str
    task: str
    metric: str
    value: float
    stderr: float | None
    paired: bool

    @property
    def significant(self) -> bool:
        """Whether the difference exceeds two standard errors; False if the error is unknown."""
        return self.stderr is not None and abs(self.value) > 2 * self.stderr

    def as_dict(self) -> dict[str, Any]:
        """The fields and the significance as plain values for JSON."""
        return super().as_dict() | {"beyond_two_standard_errors": self.significant}


def compare(results: Sequence[TaskResults]) -> list[Difference]:
    """Compare every model to the first one, metric by metric.

    >>> from prunus.evaluation.task_scores import TaskScore
    >>> def scored(model, *outcomes):
    ...     metrics = {"acc": Metric(sum(outcomes) / len(outcomes), None, outcomes)}
    ...     return TaskResults(model, (TaskScore("rte", metrics, 0, 4, "1", "", "", 1.0),), {})
    >>> [change] = compare([scored("dense", 1, 1, 1, 0), scored("pruned", 1, 0, 1, 0)])
    >>> change.value, change.stderr, change.paired
    (-0.25, 0.25, True)

    Args:
        results: of all models, on the same tasks.

    Returns:
        The differences, model by model. The mean over the paper's seven tasks comes last.

    Raises:
        ValueError: a task differs between two models: other rows, prompts or number of examples.
    """
    found = []
    for other in results[1:]:
        _check_same_tasks(results[0], other)
        before, after = results[0].metrics(), other.metrics()
        for task, metric in [key for key in before if key in after and key[0] != MEAN]:
            value, stderr, paired = _difference(before[task, metric], after[task, metric])
            found.append(Difference(other.model, task, metric, value, stderr, paired))
        if (MEAN, "acc") in before and (MEAN, "acc") in after:
            parts = [_difference(before[task, "acc"], after[task, "acc"]) for task in PAPER7]
            found.append(_mean_difference(other.model, parts))
    return found


def side_by_side(
    perplexities: Mapping[str, Sequence[PerplexityResult]],
    results: Sequence[TaskResults],
    sizes: Mapping[str, ModelSize] | None = None,
) -> dict[str, Any]:
    """What `prunus eval --json` writes: every model's results, and how tasks differ from the first.

    Args:
        perplexities: model -> its perplexities. The lists may be empty.
        sizes: model -> its size, where it is known.
    """
    sizes = sizes or {}
    on_tasks = {result.model: result.as_dict() for result in results}
    return {
        "models": [
            {
                "model": model,
                "size": sizes[model].as_dict() if model in sizes else None,
                "perplexity": [one.as_dict() for one in ones],
                "tasks": on_tasks.get(model),
            }
            for model, ones in perplexities.items()
        ],
        "differences": [change.as_dict() for change in compare(results)],
    }


def _difference(first: Metric, other: Metric) -> tuple[float, float | None, bool]:
    """other − first, its standard error, and whether it is paired."""
    value = other.value - first.value
    if first.outcomes is not None and other.outcomes is not None and len(first.outcomes) > 1:
        return value, paired_difference(first.outcomes, other.outcomes)[1], True
    if first.stderr is None or other.stderr is None:
        return value, None, False
    return value, math.hypot(first.stderr, other.stderr), False


def _mean_difference(model: str, parts: Sequence[tuple[float, float | None, bool]]) -> Difference:
    """The mean of the differences on the paper's tasks."""
    value, stderr = mean_of_tasks([(value, stderr) for value, stderr, _ in parts])
    return Difference(model, MEAN, "acc", value, stderr, all(paired for _, _, paired in parts))


def _check_same_tasks(first: TaskResults, other: TaskResults) -> None:
    definitions = {score.task: score.definition for score in first.scores}
    for score in other.scores:
        if definitions.get(score.task, score.definition) != score.definition:
            raise ValueError(
                f"{score.task} was not the same for {first.model} and {other.model}: other rows, "
                "prompts or examples; evaluate both again with the same options"
            )
