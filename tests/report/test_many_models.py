"""Perplexities of many models: each has a row of its own."""

from __future__ import annotations

import io

import pytest

from prunus.evaluation import PerplexityResult
from prunus.report.console import TerminalConsole
from prunus.report.evaluation_tables import perplexity_table


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
