"""Figures of many models: each has a row of its own."""

from __future__ import annotations

import io

import pytest

from prunus.evaluation.comparison import Difference
from prunus.evaluation.records import PerplexityResult
from prunus.evaluation.task_scores import Metric, TaskResults, TaskScore
from prunus.reporting.console import TerminalConsole
from prunus.reporting.evaluation_tables import perplexity_table, tasks_table


def result(perplexity: float) -> PerplexityResult:
    return PerplexityResult("wikitext2", perplexity, 1.0, 4, 64, 16, "protocol", 0.5)


@pytest.mark.parametrize("models", [2, 4])
def test_more_than_two_models_stand_in_rows(models):
    scores = {f"folder/model-{n}": [result(20.0 + n)] for n in range(models)}
    output = io.StringIO()
    TerminalConsole(file=output, width=160).print(perplexity_table(scores))
    lines = output.getvalue().splitlines()
    rows = [line for line in lines if "model-3" in line]
    if models == 2:
        assert not rows
        assert any("21.000" in line and "20.000" in line for line in lines)
    else:
        (row,) = rows
        assert "23.000" in row
        assert "+3.000" in row
        assert "protocol" in lines[-1]


@pytest.mark.parametrize("models", [2, 3])
def test_tasks_of_more_than_two_models_stand_in_rows(models):
    def results(number: int) -> TaskResults:
        metrics = {"acc": Metric(0.5 - 0.1 * number, 0.02, None)}
        score = TaskScore("rte", metrics, 0, 277, "1", "definition", "source", 1.0)
        protocol = {"versions": {"lm_eval": "0"}, "dtype": "float32", "batch": 1, "device": "cpu"}
        return TaskResults(f"folder/model-{number}", (score,), protocol)

    found = [results(number) for number in range(models)]
    changes = [
        Difference(each.model, "rte", "acc", -0.1 * number, 0.03, paired=True)
        for number, each in enumerate(found[1:], 1)
    ]
    output = io.StringIO()
    TerminalConsole(file=output, width=160).print(tasks_table(found, changes))
    lines = output.getvalue().splitlines()
    if models == 2:
        assert any("50.0" in line and "40.0" in line for line in lines)
    else:
        (row,) = [line for line in lines if "model-2" in line and "models:" not in line]
        assert "30.0" in row
        assert "-20.0" in row
        assert "277" in row
