"""Results as tables in a notebook."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

import prunus
from prunus.evaluation.records import Divergence, Metric, PerplexityResult, TaskResults, TaskScore
from report_samples import HOSTILE, sweep_results
from tiny import tiny_checkpoint, token_ids


class Table(HTMLParser):
    """The text of every cell, row by row, and the names of all elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.inside = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


def rows(result) -> list[list[str]]:
    return Table(result._repr_html_()).rows


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    dense = tiny_checkpoint(folder / "dense")
    return prunus.prune(dense, folder / "out", calibration=token_ids(2))


def test_a_run_has_a_row_for_each_kind_of_linear_and_one_for_all(manifest):
    head, *kinds, total = rows(manifest)
    assert head == ["linear", "count", "weights", "zeros", "removed energy", "seconds"]
    assert [row[0] for row in kinds] == list(manifest.blocks[0].linears)
    assert total[:4] == ["all", "14", f"{manifest.totals['weights']:,}", "50.00%"]
    unfinished = manifest.model_copy(update={"state": "running"})
    assert "not finished" in unfinished._repr_html_()
    assert "not finished" not in manifest._repr_html_()
    slow = manifest.model_copy(update={"totals": {**manifest.totals, "seconds": 98.76}})
    assert "98.8 s" in slow._repr_html_() and float(rows(slow)[-1][-1]) < 98, "a sum of its column"


def test_an_inspection_has_a_row_for_each_linear(tmp_path):
    found = prunus.inspect(tiny_checkpoint(tmp_path / "dense"))
    assert len(rows(found)) == 1 + 14 + 1
    assert rows(found)[1] == ["model.layers.0.self_attn.q_proj", "32 × 32", "float32", "0.00%"]
    assert rows(found)[-1][0] == "all"


def test_a_perplexity_shows_the_comparison_where_there_is_one():
    alone = PerplexityResult("wikitext2", 12.5, 2.5257, 4, 64, 16, "as in the papers", 1.0)
    found = Divergence("dense", 0.1234, 0.01, 0.9, 0.876, 0.02, 11.0, 1.1364, 0.01)
    assert ["perplexity", "12.500"] in rows(alone)
    assert not any("KL" in row[0] for row in rows(alone))
    compared = replace(alone, divergence=found)
    assert ["KL divergence", "0.12340 ± 0.01000"] in rows(compared)
    assert "Compared with dense: KL divergence (nats per token)" in compared._repr_html_()


def test_scores_of_tasks_come_with_their_errors():
    score = TaskScore(
        "boolq", {"acc": Metric(0.5, 0.05), "ppl": Metric(9.0, None)}, 0, 9, "1", "", "", 1.0
    )
    results = TaskResults("model", (score,), {"dtype": "float32"})
    assert rows(results)[1:] == [
        ["boolq", "acc", "0.5000", "0.0500"],
        ["boolq", "ppl", "9.0000", "–"],
    ]


def test_a_report_shows_its_tables_without_charts(tmp_path):
    sweep_results().save(tmp_path)
    shown = Table(prunus.report(tmp_path)._repr_html_())
    assert "table" in shown.tags and not {"script", "figure"} & shown.tags


def test_names_are_escaped(tmp_path, manifest):
    hostile = sweep_results(name=HOSTILE, text=HOSTILE, error=HOSTILE)
    hostile.save(tmp_path)
    score = TaskScore(HOSTILE, {HOSTILE: Metric(1.0, None)}, 0, 1, "1", "", "", 1.0)
    shown = (
        hostile,
        prunus.report(tmp_path, title=HOSTILE),
        manifest.model_copy(update={"source": HOSTILE}),
        PerplexityResult(HOSTILE, 1.0, 0.0, 1, 2, 2, HOSTILE, 1.0),
        TaskResults(HOSTILE, (score,), {HOSTILE: HOSTILE}),
    )
    for result in shown:
        html = result._repr_html_()
        assert not {"script", "img"} & Table(html).tags
        assert re.search("&lt;script&gt;", html)
