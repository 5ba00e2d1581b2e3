"""Quality against size and speed: the figures of sweeps and evaluations in tables and charts."""

from __future__ import annotations

import json

import pytest

from prunus.reporting.document import Lines, Measured, Table
from prunus.reporting.figures import figure_json
from prunus.reporting.size_charts import decode_speed
from prunus.reporting.sources import read_document
from prunus.reporting.sweep_tables import sweep_section
from prunus.sweeping.results import Divergence, Size
from report_samples import bench, evaluation, sweep_results, write

FIGURES = {
    "reference": "dense",
    "kl_stderr": 0.01,
    "kl_q999": 2.5,
    "same_top": 0.75,
    "same_top_stderr": 0.02,
    "reference_perplexity": 20.5,
    "perplexity_ratio": 1.5,
    "perplexity_ratio_stderr": 0.1,
}


def compared_sweep():
    """The sample sweep, whose cells of Wanda have sizes and divergences."""
    results = sweep_results()
    for cell, kl, packed in zip(results.cells[2:5], (0.25, 0.75, 1.0), (4, 4, 2), strict=True):
        score = cell.scores["wikitext2"]
        divergence = Divergence(kl=kl, **FIGURES)
        cell.scores = {"wikitext2": score.model_copy(update={"divergence": divergence})}
        cell.size = Size(
            file_bytes=8 * 10**9,
            bits_per_weight=16,
            packed_file_bytes=packed * 10**9,
            packed_bits_per_weight=2.0 * packed,
        )
    return results


def charts(section):
    return {part.title: part for part in section.parts if isinstance(part, Lines)}


def table(section, title):
    [found] = [p for p in section.parts if isinstance(p, Table) and p.title == title]
    titles = [column.title for column in found.columns]
    return {row[0]: dict(zip(titles, row, strict=True)) for row in found.rows}


def test_a_sweep_shows_divergences_and_packed_sizes():
    results = compared_sweep()
    section = sweep_section(results)
    assert table(section, "KL divergence on wikitext2")["wanda"] == {
        "method": "wanda",
        "50%": 0.5,  # the mean over two seeds
        "2:4": 1.0,
    }
    row = table(section, "Cells")["smol-wanda-0.5-0"]
    assert row["KL divergence, wikitext2"] == Measured(0.25, 0.01)
    assert row["KL 99.9 % quantile, wikitext2"] == 2.5
    assert row["same top token, wikitext2"] == Measured(0.75, 0.02)
    assert (row["packed, GB"], row["bits per weight"]) == (4, 8)
    assert "decode, tokens/s" not in row


def test_a_sweep_without_divergences_shows_none():
    section = sweep_section(sweep_results())
    assert not [title for title in charts(section) if "against" in title]
    assert not [title for title in table(section, "Cells")["smol-dense"] if "KL" in title]


def test_charts_of_a_sweep_join_the_results_of_a_method():
    found = charts(sweep_section(compared_sweep()))
    kl = found["KL divergence on wikitext2 against bits per weight"]
    assert [(s.name, s.x, s.y) for s in kl.series] == [("wanda", (4, 8), (1.0, 0.5))]
    assert kl.level is None
    perplexity = found["Perplexity on wikitext2 against file size"]
    assert [(s.name, s.x, s.y) for s in perplexity.series] == [("wanda", (2, 4), (61.5, 32.0))]
    assert perplexity.level == ("dense", 20.5)
    assert not [title for title in found if "decoding" in title]
    drawn = json.loads(figure_json(kl))
    assert drawn["data"][0]["mode"] == "lines+markers"
    assert "tickvals" not in drawn["layout"]["xaxis"]


def test_speeds_belong_to_the_cells_in_whose_folders_the_models_lie():
    cells = [cell.name for cell in compared_sweep().cells]
    speeds = {f"OUT/cells/{cells[place]}/model": 10.0 * place for place in (2, 3, 4)}
    section = sweep_section(compared_sweep(), speeds)
    assert table(section, "Cells")[cells[4]]["decode, tokens/s"] == 40
    [series] = charts(section)["KL divergence on wikitext2 against decoding speed"].series
    assert (series.x, series.y) == ((25, 40), (0.5, 1.0))


def compared_evaluation(kls=(0.0, 0.5, 0.25)):
    content = evaluation()
    first = content["models"][0]
    content["models"] = [
        {
            "model": f"runs/{'abc'[place]}",
            "size": {"file_bytes": 10**9 * (place + 1), "bits_per_weight": 16.0 / (place + 1)},
            "perplexity": [first["perplexity"][0] | {"divergence": FIGURES | {"kl": kl}}],
            "tasks": None,
        }
        for place, kl in enumerate(kls)
    ]
    content["differences"] = []
    return content


def test_an_evaluation_shows_sizes_and_names_beside_its_points(tmp_path):
    file = write(tmp_path / "e.json", compared_evaluation())
    speeds = write(tmp_path / "b.json", bench("other/b", "runs/c"))
    section = read_document([file], speeds).sections[0]
    assert table(section, "Size")["b"] == {
        "model": "b",
        "file, GB": 2.0,
        "bits per weight": 8.0,
        "decode, tokens/s": 16.0,
    }
    found = charts(section)
    assert len(found) == 6
    kl = found["KL divergence on wikitext2 against file size"]
    assert [(s.name, s.x, s.y) for s in kl.series] == [("b", (2,), (0.5,)), ("c", (3,), (0.25,))]
    drawn = json.loads(figure_json(kl))
    assert [trace["text"] for trace in drawn["data"]] == [["b"], ["c"]]
    assert {trace["mode"] for trace in drawn["data"]} == {"markers+text"}
    low, high = drawn["layout"]["xaxis"]["range"]
    assert low < 2
    assert high > 3
    assert found["Perplexity on wikitext2 against file size"].level == ("dense", 20.5)


def test_an_evaluation_of_an_earlier_version_has_no_sizes(tmp_path):
    [section] = read_document([write(tmp_path / "e.json", evaluation())]).sections
    assert not charts(section)
    assert not [part for part in section.parts if part.title == "Size"]


@pytest.mark.parametrize(
    ("model", "names", "speed"),
    [("a/b", (), 1.0), ("x", ("c",), 2.0), ("x", ("b", "d"), 1.0), ("x", (), None)],
)
def test_a_speed_is_found_by_path_or_by_a_part_of_it(model, names, speed):
    assert decode_speed({"a/b": 1.0, "OUT/c/packed": 2.0}, model, *names) == speed
