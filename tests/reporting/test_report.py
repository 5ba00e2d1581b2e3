"""Reports: figures equal the JSON that they come from, and hostile names are only text."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import save_file

import prunus
import prunus.reporting
from command_line import call
from prunus.engine.document import Document, Lines, Measured, Table, text_of
from prunus.pruning.manifest import Manifest
from prunus.pruning.recipe import Recipe
from prunus.reporting.console import to_terminal
from prunus.reporting.page import document_json, figure_json, to_html, to_markdown
from prunus.reporting.sweep_section import sweep_section
from prunus.reporting.write import report
from prunus.sweeping.results import CellResult
from report_samples import (
    HOSTILE,
    evaluation,
    hostile_document,
    rows,
    sweep_results,
    table,
    whole_document,
    write,
)
from tiny import tiny_checkpoint, token_ids

# --- what reports are made from ---


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A pruned checkpoint; no test writes to it."""
    folder = tmp_path_factory.mktemp("report")
    dense = tiny_checkpoint(folder / "dense")
    save_file({"input_ids": token_ids(4, 16)}, folder / "ids.safetensors")
    prunus.prune(
        dense, folder / "out", calibration=str(folder / "ids.safetensors"), samples=4, seqlen=16
    )
    return folder / "out"


@pytest.fixture
def everything(run, tmp_path) -> Document:
    return whole_document(tmp_path, run)


# --- the figures ---


def test_a_run_is_shown_with_its_manifests_figures(run):
    [section] = report([run]).sections
    manifest = Manifest.load(run)
    kinds = table(section, "wanda, ")
    assert list(kinds) == list(manifest.blocks[0].linears)
    for name, row in kinds.items():
        records = [block.linears[name] for block in manifest.blocks]
        assert row["count"] == 2
        assert row["seconds"] == sum(record.seconds for record in records)
        assert row["removed energy"] == pytest.approx(
            np.mean([record.removed_energy for record in records])
        )
    linears = rows(section, "All 14 linears")
    for index, block in enumerate(manifest.blocks):
        for place, (name, record) in enumerate(block.linears.items()):
            row = linears[index * 7 + place]
            assert row["linear"] == f"{block.name}.{name}"
            assert (row["zeros"], row["sparsity"]) == (record.zeros, record.sparsity)
            assert row["removed energy"] == record.removed_energy
    assert len(linears) == 14
    [chart] = [part for part in section.parts if isinstance(part, Lines)]
    errors = [[x.removed_energy for x in block.linears.values()] for block in manifest.blocks]
    assert chart.series[0].y == pytest.approx([100 * np.mean(each) for each in errors])


def test_a_sweep_is_shown_with_means_over_seeds_gaps_and_failures():
    results = sweep_results()
    for cell in results.cells:
        cell.residual_gap = {"wikitext2": 2.0 if cell.state == "done" else None}
    section = sweep_section(results)
    shown = table(section, "Perplexity on wikitext2")
    assert list(shown) == ["dense", "magnitude", "wanda", "wanda, recovered by lora", "sparsegpt"]
    assert (shown["dense"]["50%"], shown["dense"]["2:4"]) == (20.5, 20.5)
    assert (shown["magnitude"]["50%"], shown["magnitude"]["2:4"]) == (522.02, None)
    assert (shown["wanda"]["50%"], shown["wanda"]["2:4"]) == ((31.25 + 32.75) / 2, 61.5)
    assert shown["wanda, recovered by lora"]["50%"] == 27.5
    assert table(section, "Residual gap on wikitext2")["wanda"]["2:4"] == 2.0
    assert table(section, "What failed") == {
        "smol-sparsegpt": {"model": "smol-sparsegpt", "reason": "OSError: full"}
    }
    cells = table(section, "Models")
    assert cells["smol-dense"]["perplexity, wikitext2"] == 20.5
    assert cells["smol-wanda-0.5-1"]["perplexity, wikitext2"] == 32.75
    assert cells["smol-wanda+lora"]["recovery seconds"] == 99.0
    assert table(section, "Tasks")["smol-dense"]["boolq"] == Measured(0.7, 0.0123)
    text = to_markdown(Document("t", (section,)))
    assert "| smol-dense | 70.00% ± 1.23% | 9.5 |" in text
    assert "What it is for." in text


def test_rows_are_named_by_what_tells_them_apart():
    def names(*recipes: dict) -> list[str]:
        results = sweep_results()
        model = results.models["smol"].scores
        results.cells = [
            CellResult(
                name=str(place), model="smol", recipe=Recipe(**recipe), state="done", scores=model
            )
            for place, recipe in enumerate(recipes)
        ]
        [shown] = [
            p
            for p in sweep_section(results).parts
            if isinstance(p, Table) and p.title.startswith("Perplexity")
        ]
        return [column.title for column in shown.columns[1:]] + [row[0] for row in shown.rows[1:]]

    assert names({"group": "layer"}, {"group": 128}) == [
        "50%",
        "wanda, group layer",
        "wanda, group 128",
    ]
    assert names({}, {"method": "obs"}, {"method": "obs", "mask_order": "blockwise"}) == [
        "50%",
        "wanda",
        "obs, mask order before",
        "obs, mask order blockwise",
    ]
    assert names({"samples": 1}, {"samples": 64}) == ["1 window", "64 windows", "wanda"]
    assert names({"samples": 1, "sparsity": 0.1}, {"sparsity": 0.2, "samples": 2}) == [
        "10%",
        "20%",
        "wanda, samples 1",
        "wanda, samples 2",
    ]


def test_charts_join_what_is_numeric():
    results = sweep_results()
    score = results.models["smol"].scores["wikitext2"]
    results.cells = [
        CellResult(
            name=f"{sparsity}", model="smol", state="done", recipe=Recipe(sparsity=sparsity),
            scores={"wikitext2": replace(score, perplexity=30.0 * (place + 1))},
        )
        for place, sparsity in enumerate((0.1, 0.5, 0.8))
    ]  # fmt: skip
    [chart] = [part for part in sweep_section(results).parts if isinstance(part, Lines)]
    drawn = json.loads(figure_json(chart))["data"]
    assert drawn[0]["x"] == [10.0, 50.0, 80.0]
    assert drawn[0]["y"] == [30.0, 60.0, 90.0]
    assert drawn[1]["y"] == [20.5, 20.5]


def compare_by_hand(first: list[float], second: list[float]) -> tuple[float, float]:
    steps = np.array(second) - np.array(first)
    return float(steps.mean()), float(steps.std(ddof=1) / np.sqrt(len(steps)))


def test_an_evaluation_is_shown_with_differences(tmp_path):
    [section] = report([write(tmp_path / "eval.json", evaluation("a/dense", "b/pruned"))]).sections
    assert section.title == "Evaluation of dense, pruned"
    assert [tuple(row.values()) for row in rows(section, "Quality and size")] == [
        ("dense", "wikitext2", 19.125),
        ("pruned", "wikitext2", 42.5),
    ]
    first, other, *_ = rows(section, "Tasks")
    assert (first["task"], first["metric"], first["model"]) == ("boolq", "acc", "dense")
    assert (first["figure"], first["− first"]) == (Measured(0.75, 0.25, ".2%"), None)
    assert (first["shots"], first["rows"]) == (0, 4)
    difference = compare_by_hand([1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0])
    assert (other["model"], other["figure"]) == ("pruned", Measured(0.25, 0.25, ".2%"))
    assert other["− first"] == Measured(*difference, "+.2%")
    assert other["beyond chance"] == "no"


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (None, ".2f", "–"),
        (1234.567, ",.2f", "1,234.57"),
        (0.5, ".2%", "50.00%"),
        ("2:4", None, "2:4"),
        (Measured(0.5, 0.25), ".1%", "50.0% ± 25.0%"),
        (Measured(7.0, None, ".2f"), ".1%", "7.00"),
        (Measured(-0.5, 0.25, "+.1%"), None, "-50.0% ± 25.0%"),
    ],
)
def test_figures_are_written_in_one_way(value, form, text):
    assert text_of(value, form) == text


# --- the page as a file ---


class Tags(HTMLParser):
    """Elements and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def tags(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed(page)
    return parser.found


def test_hostile_names_are_text_and_nothing_else(run, tmp_path):
    plain = to_html(report([run]))
    page = to_html(hostile_document(tmp_path, run))
    assert {tag for tag, _ in tags(page)} - {"a", "h2", "li", "nav", "ul"} <= {
        tag for tag, _ in tags(plain)
    }
    assert all(not name.startswith("on") for _, attributes in tags(page) for name in attributes)
    assert {attributes.get("href") for tag, attributes in tags(page) if tag == "a"} == {
        f"#section-{k}" for k in range(3)
    }
    executed = [
        attributes for tag, attributes in tags(page) if tag == "script" and "type" not in attributes
    ]
    # page.js alone runs; it expands the plotting library, whose hash the policy has as well.
    assert len(executed) == 1


def test_hostile_names_are_text_in_markdown_and_in_the_terminal_too(run, tmp_path):
    document = hostile_document(tmp_path, run)
    text = to_markdown(document)
    assert not re.search(r"(?<!\\)<", text)
    assert not re.search(r"(?<!\\)\[a\]", text)
    for line in text.splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) >= 3
    console = Console(width=4000, record=True, file=io.StringIO())
    console.print(to_terminal(document))
    assert HOSTILE in console.export_text()


def test_the_page_carries_everything_and_may_run_only_its_own_scripts(everything):
    page = to_html(everything)
    [policy] = [
        a["content"] for tag, a in tags(page) if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; ")
    (own,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    (packed,) = re.findall(r'<script type="application/gzip" id="plotly">(.*?)</script>', page)
    library = gzip.decompress(base64.b64decode(packed))
    assert library.startswith(b"/**\n* plotly.js (cartesian - minified)")
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'"
        for script in (own.encode(), library)
    ]
    assert f"script-src {' '.join(hashes)};" in policy
    for tag, attributes in tags(page):
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith(("#", "data:,")), tag
    assert {a["name"]: a["content"] for tag, a in tags(page) if "name" in a}["viewport"].startswith(
        "width=device-width"
    )


def test_pages_are_small(run, tmp_path):
    assert len(to_html(report([run]))) < 1_000_000
    without_charts = report([write(tmp_path / "e.json", evaluation())])
    assert len(to_html(without_charts)) < 50_000


# --- the command ---


def test_the_command_writes_a_page_markdown_or_the_terminal(run, tmp_path):
    call("report", run, "-o", tmp_path / "new" / "r.html")
    page = (tmp_path / "new" / "r.html").read_text()
    assert page.startswith("<!doctype html>")
    result = call(
        "report", run, "-o", tmp_path / "r.md", "--title", "My run", "--json", tmp_path / "r.json"
    )
    assert "r.md, 0.0 MB" in result.stderr
    assert (tmp_path / "r.md").read_text().startswith("# My run\n")
    assert json.loads((tmp_path / "r.json").read_text()) == document_json(
        report([run], title="My run")
    )
    assert "self_attn.q_proj" in call("report", run).stdout


# --- imports ---


@pytest.mark.parametrize("totals", [{}, {"zeros": 3}, {"zeros": "x", "seconds": None}])
def test_a_record_without_totals_is_shown_by_what_it_has(totals, run, tmp_path):
    content = json.loads((run / "prunus.json").read_text())
    unfinished = {"totals": totals, "state": "running", "blocks": content["blocks"][:1]}
    write(tmp_path / "prunus.json", content | unfinished)
    page = to_markdown(report([tmp_path]))
    assert "sparsity reached" in page
    assert "peak memory" not in page
    assert "unfinished: 1 block done" in page


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("models", 0, "perplexity", 0, "perplexity"), "high"),
        (("models", 0, "perplexity", 0, "perplexity"), {"a": 1}),
        (("models", 0, "tasks", "tasks"), 3),
        (("models", 0, "tasks", "paper7_mean_acc"), {}),
        (("models",), []),
        (("differences", 0, "value"), [1]),
    ],
)
def test_figures_that_are_none_are_refused_by_the_name_of_the_file(place, value, tmp_path):
    content = node = evaluation()
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    path = write(tmp_path / "eval.json", content)
    with pytest.raises(ValueError, match=r"eval\.json"):
        report([path])


def test_a_record_whose_recipe_is_none_is_refused_by_name(tmp_path):
    write(tmp_path / "prunus.json", {"recipe": 3})
    with pytest.raises(ValueError, match=r"prunus\.json is damaged or of another version"):
        report([tmp_path])
