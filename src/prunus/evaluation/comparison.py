"""Models side by side: is a difference more than chance?

All models answer the same rows, so the difference is taken row by row: with d_i the difference of two models'
outcomes on row i, its standard error is sd(d)/√n (sd with n − 1). That is smaller than √(s₁² + s₂²), which
takes the models for independent, and is used where no outcomes of single rows are known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prunus.evaluation.perplexity import PerplexityResult
from prunus.evaluation.task_scores import MEAN, PAPER7, Metric, TaskResults, paired_difference

__all__ = ["Difference", "compare", "side_by_side"]


@dataclass(frozen=True)
class Difference:
    """One model's figure minus the first model's.

    Attributes:
        model, task, metric: whose and which.
        value: the difference, in the unit of the metric.
        stderr: its standard error, None where it is not known.
        paired: whether it was taken row by row.
    """

    model: str
    task: str
    metric: str
    value: float
    stderr: float | None
    paired: bool

    @property
    def significant(self) -> bool:
        """Whether it is beyond two standard errors. An unknown error makes nothing significant."""
        return self.stderr is not None and abs(self.value) > 2 * self.stderr

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self) | {"beyond_two_standard_errors": self.significant}


def compare(results: Sequence[TaskResults]) -> list[Difference]:
    """Differences of every model but the first to the first, figure by figure.

    Raises:
        ValueError: a task was not the same for two models: other rows, another number of examples.
    """
    found = []
    for other in results[1:]:
        _check_same_tasks(results[0], other)
        before, after = results[0].figures(), other.figures()
        for task, metric in [key for key in before if key in after and key[0] != MEAN]:
            value, stderr, paired = _difference(before[task, metric], after[task, metric])
            found.append(Difference(other.model, task, metric, value, stderr, paired))
        if (MEAN, "acc") in before and (MEAN, "acc") in after:
            parts = [_difference(before[task, "acc"], after[task, "acc"]) for task in PAPER7]
            errors = [stderr for _, stderr, _ in parts if stderr is not None]
            found.append(
                Difference(
                    other.model,
                    MEAN,
                    "acc",
                    sum(value for value, _, _ in parts) / len(PAPER7),
                    math.hypot(*errors) / len(PAPER7) if len(errors) == len(PAPER7) else None,
                    all(paired for _, _, paired in parts),
                )
            )
    return found


def side_by_side(
    perplexities: Mapping[str, Sequence[PerplexityResult]], results: Sequence[TaskResults]
) -> dict[str, Any]:
    """What `prunus eval --json` writes: every model's figures, and the differences to the first.

    Args:
        perplexities: model -> its results, possibly none.
        results: of the same models on tasks, or none at all.
    """
    on_tasks = {result.model: result.as_dict() for result in results}
    return {
        "models": [
            {
                "model": model,
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


def _check_same_tasks(first: TaskResults, other: TaskResults) -> None:
    definitions = {score.task: score.definition for score in first.scores}
    for score in other.scores:
        if definitions.get(score.task, score.definition) != score.definition:
            raise ValueError(
                f"{score.task} was not the same for {first.model} and {other.model}: other rows, prompts or "
                "examples; judge both again with the same options"
            )
