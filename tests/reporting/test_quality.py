"""Quality against size: the figures of sweeps and evaluations in tables and charts."""

from __future__ import annotations

import json
from dataclasses import replace

from prunus.engine.document import Lines, Measured
from prunus.evaluation.records import Divergence, ModelSize
from prunus.reporting.page import figure_json
from prunus.reporting.sweep_section import sweep_section
from prunus.reporting.write import report
from report_samples import (
    DIVERGENCE,
    compared_evaluation,
    evaluation,
    sweep_results,
    table,
    write,
)


def compared_sweep():
    """The sample sweep, whose cells of Wanda have sizes and divergences."""
    results = sweep_results()
    for cell, kl, size in zip(results.cells[2:5], (0.25, 0.75, 1.0), (4, 4, 2), strict=True):
        score = cell.scores["wikitext2"]
        divergence = Divergence(kl=kl, **DIVERGENCE)
        cell.scores = {"wikitext2": replace(score, divergence=divergence)}
        cell.size = ModelSize(size * 10**9, 2.0 * size)
    return results


def charts(section):
    return {part.title: part for part in section.parts if isinstance(part, Lines)}


def test_a_sweep_shows_divergences_and_sizes():
    section = sweep_section(compared_sweep())
    assert table(section, "KL divergence on wikitext2")["wanda"] == {
        "method": "wanda",
        "50%": 0.5,  # the mean over two seeds
        "2:4": 1.0,
    }
    row = table(section, "Models")["smol-wanda-0.5-0"]
    assert row["KL divergence, wikitext2"] == Measured(0.25, 0.01)
    assert row["KL 99.9 % quantile, wikitext2"] == 2.5
    assert row["same top token, wikitext2"] == Measured(0.75, 0.02)
    assert (row["file, GB"], row["bits per weight"]) == (4, 8)
    plain = sweep_section(sweep_results())
    assert not [title for title in charts(plain) if "against" in title]
    assert not [title for title in table(plain, "Models")["smol-dense"] if "KL" in title]


def test_one_chart_of_a_sweep_joins_the_results_of_a_method_and_has_the_dense_model():
    results = compared_sweep()
    results.models["smol"].size = ModelSize(8 * 10**9, 16.0)
    found = charts(sweep_section(results))
    assert list(found) == ["Perplexity on wikitext2 against size"]
    [chart] = found.values()
    assert [(s.name, s.x, s.y) for s in chart.series] == [
        ("dense", (8,), (20.5,)),
        ("wanda", (2, 4), (61.5, 32.0)),
    ]
    assert chart.level == ("dense", 20.5)
    assert chart.series[1].hover[0] == "wanda, 2:4: 61.500 at 2.000, KL 1.0000"
    drawn = json.loads(figure_json(chart))
    assert drawn["data"][1]["mode"] == "lines+markers"
    assert "tickvals" not in drawn["layout"]["xaxis"]


def lettered_evaluation(kls=(0.0, 0.5, 0.25)):
    """An evaluation of runs/a, runs/b, …, without a reference."""
    content = compared_evaluation(*(f"runs/{'abc'[place]}" for place in range(len(kls))))
    for place, (model, kl) in enumerate(zip(content["models"], kls, strict=True), 1):
        model["size"]["bits_per_weight"] = 16.0 / place
        model["perplexity"][0]["divergence"] |= {"kl": kl}
    return content | {"reference": None}


def test_an_evaluation_shows_sizes(tmp_path):
    file = write(tmp_path / "e.json", lettered_evaluation())
    section = report([file]).sections[0]
    row = table(section, "Quality and size")["b"]
    assert (row["file, GB"], row["bits per weight"]) == (2.0, 8.0)
    assert row["KL divergence"] == Measured(0.5, 0.01)
    [chart] = charts(section).values()
    assert chart.title == "Perplexity on wikitext2 against size"
    assert [(s.name, s.x) for s in chart.series] == [("a", (1,)), ("b", (2,)), ("c", (3,))]
    assert chart.level == ("dense", 20.5)


def test_an_evaluation_says_first_how_much_smaller_and_worse_a_model_is(tmp_path):
    content = lettered_evaluation((0.5,))
    content["models"][0]["perplexity"][0]["source"] = "wikitext2 (its test text)"
    size = {"file_bytes": 4 * 10**9, "bits_per_weight": 16.0}
    content["reference"] = {"model": "runs/dense", "size": size}
    file = write(tmp_path / "e.json", content)
    first = report([file]).sections[0].parts[0]
    assert first.headline
    assert first.items == (("a", "25% of the size, KL 0.500 on wikitext2"),)


def test_an_evaluation_without_sizes_has_no_charts(tmp_path):
    [section] = report([write(tmp_path / "e.json", evaluation())]).sections
    assert not charts(section)
    assert "file, GB" not in table(section, "Quality and size")["dense"]
