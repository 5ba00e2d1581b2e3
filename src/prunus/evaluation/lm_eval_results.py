"""Results of lm-eval, read into our own scores. Needs no lm-eval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prunus.evaluation.task_scores import Metric, TaskScore


def read_scores(
    found: Mapping[str, Any], *, definition: str, source: str, seconds: float
) -> list[TaskScore]:
    """The scores that `lm_eval.evaluate` returned; groups are before their members.

    Raises:
        ValueError: a log-likelihood is NaN.
    """
    scores = []
    for name in sorted(found["results"], key=lambda name: name in found["samples"]):
        results = found["results"][name]
        # Several ranks return the rows in another order. Two models are compared row by row, so we
        # sort.
        samples = sorted(found["samples"].get(name, []), key=lambda row: row["doc_id"])
        _check_finite(name, samples)
        scores.append(
            TaskScore(
                task=name,
                metrics=_metrics(results, samples),
                shots=int(found["n-shot"].get(name) or 0),
                rows=int(results.get("sample_len", len(samples))),
                version=str(found["versions"].get(name)),
                definition=definition,
                source=source,
                seconds=seconds,
            )
        )
    return scores


def _metrics(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Metric]:
    """Read the metrics of one task.

    lm-eval's keys are `metric,filter` and `metric_stderr,filter`; "N/A" is an unknown error.

    >>> list(_metrics({"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": "rte"}, []).items())
    [('acc', Metric(value=0.5, stderr=None, outcomes=None))]
    """
    metrics = {}
    for key, value in results.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = results.get(f"{name}_stderr,{kind}")
        outcomes: list[Any] = [row.get(name) for row in samples if row["filter"] == kind]
        metrics[name if kind == "none" else f"{name} ({kind})"] = Metric(
            float(value),
            float(error) if isinstance(error, int | float) else None,
            tuple(float(outcome) for outcome in outcomes) if _is_mean(value, outcomes) else None,
        )
    return metrics


def _is_mean(value: float, outcomes: Sequence[Any]) -> bool:
    """Whether a value is the mean of its rows' outcomes. A perplexity, for example, is not."""
    if not outcomes or not all(isinstance(outcome, int | float) for outcome in outcomes):
        return False
    return math.isclose(sum(outcomes) / len(outcomes), value, abs_tol=1e-9)


def _check_finite(name: str, samples: Sequence[Mapping[str, Any]]) -> None:
    """Refuse log-likelihoods that are NaN: lm-eval would choose among them and score the choice."""
    for row in samples:
        for response in row["filtered_resps"]:
            likelihood = (
                response[0] if isinstance(response, tuple | list) and response else response
            )
            if isinstance(likelihood, float) and math.isnan(likelihood):
                raise ValueError(
                    f"{name}, row {row['doc_id']}: the model's outputs are not finite. Damaged "
                    "weights, or a dtype too small for this model; try `dtype` float32"
                )
