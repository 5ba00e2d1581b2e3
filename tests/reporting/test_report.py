"""Reports: figures equal the JSON that they come from, and hostile names are only text.

On a page, as Markdown, in the terminal and in a notebook.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

import prunus
from command_line import call
from prunus.document import Document, Lines, Measured, Table, text_of
from prunus.evaluation.eval_records import (
    Divergence,
    ModelSize,
    PerplexityResult,
)
from prunus.pruning.manifest import Manifest
from prunus.pruning.recipe import Recipe
from prunus.reporting.console import to_terminal
from prunus.reporting.page import document_json, figure_json, to_html, to_markdown
from prunus.reporting.run_sections import structure_section
from prunus.reporting.sweep_section import sweep_section
from prunus.reporting.write import report
from prunus.structure.structure_record import StructureRecord
from prunus.sweeping.results import CellResult
from refusals import assert_refused
from report_samples import (
    DIVERGENCE,
    HOSTILE,
    compared_evaluation,
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
            assert (row["zeros"], row["sparsity reached"]) == (record.zeros, record.sparsity)
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
    one_seed = {"stderr": None, "seeds": 1}
    assert shown["magnitude"]["50%"] == Measured(522.02, **one_seed)
    assert shown["magnitude"]["2:4"] is None
    assert shown["wanda"]["50%"] == Measured(32.0, pytest.approx(1.5 / 2**0.5))
    assert shown["wanda"]["2:4"] == Measured(61.5, **one_seed)
    assert shown["wanda, recovered by lora"]["50%"] == Measured(27.5, **one_seed)
    assert table(section, "Residual gap on wikitext2")["wanda"]["2:4"] == Measured(2.0, **one_seed)
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
    for name in ("new/r.html", "r.md", "r.csv", "r.csv", "r.tex", "r.tex"):
        call("report", run, "-o", tmp_path / name, "--json", tmp_path / "r.json")


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
        (("models", 0, "tasks", "results"), 3),
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
    assert_refused(ValueError, r"eval\.json", report, [path])


def test_a_record_whose_recipe_is_none_is_refused_by_name(tmp_path):
    write(tmp_path / "prunus.json", {"recipe": 3})
    assert_refused(ValueError, r"prunus\.json is damaged or of another version", report, [tmp_path])


# --- quality against size ---


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
        "50%": Measured(0.5, pytest.approx(0.5 / 2**0.5)),  # the mean over two seeds
        "2:4": Measured(1.0, None, seeds=1),
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
    assert list(found) == [
        "Perplexity on wikitext2 against size",
        "Perplexity on wikitext2 by sparsity",
        "KL divergence on wikitext2 by sparsity",
    ]
    chart = next(iter(found.values()))
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
    assert first.items == (
        ("a", "25% of the size, KL 0.500 and the same top token for 75.0% on wikitext2"),
    )


def test_an_evaluation_without_sizes_has_no_charts(tmp_path):
    [section] = report([write(tmp_path / "e.json", evaluation())]).sections
    assert not charts(section)
    assert "file, GB" not in table(section, "Quality and size")["dense"]


def test_cells_without_a_record_are_named_beside_the_others(run, tmp_path):
    sweep_results().save(tmp_path)
    done, waiting = (tmp_path / "cells" / name for name in ("done", "waiting"))
    shutil.copytree(run, done)
    (waiting / "model").mkdir(parents=True)
    first, last = report([waiting, done]).sections
    assert first == report([done]).sections[0]
    assert last.title == "Left out" and last.lead.endswith(": waiting.")
    assert_refused(ValueError, "waiting holds neither", report, [waiting])


def test_a_sparsity_that_was_missed_stands_beside_the_one_that_was_asked_for(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense")
    how = {"calibration": token_ids(), "batch": 2}
    prunus.prune(dense, tmp_path / "missed", sparsity=0.7, **how)
    prunus.prune(dense, tmp_path / "reached", sparsity=0.5, **how)
    missed, reached = (
        dict(report([tmp_path / name]).sections[0].parts[0].items)["sparsity of the pruned linears"]
        for name in ("missed", "reached")
    )
    assert (missed, reached) == ("68.75% (asked for: 70.00%)", "50.00%")


def test_the_sparsity_of_pruned_linears_and_that_of_all_have_names_that_say_which(tmp_path):
    dense, out = tiny_checkpoint(tmp_path / "dense"), tmp_path / "out"
    manifest = prunus.prune(dense, out, calibration=token_ids(), ignore=["*.1.mlp.*"])
    found, shown = prunus.inspect(out), dict(report([out]).sections[0].parts[0].items)
    assert found.sparsity < 0.45
    for which, share in (
        ("pruned_linears", pytest.approx(0.5, abs=0.001)),
        ("all_linears", pytest.approx(found.sparsity)),
    ):
        assert manifest.totals[f"sparsity_of_{which}"] == share
        assert found.as_dict()[f"sparsity_of_{which}"] == share
    assert shown["sparsity of the pruned linears"] == "50.00%"
    assert shown["sparsity of all linears"] == f"{found.sparsity:.2%}"
    for text in ((out / "README.md").read_text(), manifest._repr_html_(), found._repr_html_()):
        assert "50.00%" in text and f"{found.sparsity:.2%}" in text


# --- smaller models ---


def test_each_run_has_a_section_of_its_own(smaller):
    assert len(prunus.report(smaller).sections) == 1
    assert len(prunus.report([smaller, smaller]).sections) == 2


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    """A mixture of experts that lost a block and experts."""
    folder = tmp_path_factory.mktemp("structure")
    dense = tiny_checkpoint(folder / "dense", "mixtral", num_hidden_layers=3)
    prunus.shrink(dense, folder / "out", blocks=2, experts=3, calibration=token_ids(), batch=2)
    return folder / "out"


def test_figures_are_those_of_the_record(smaller):
    record = StructureRecord.load(smaller)
    document = prunus.report([smaller])
    section = document.sections[0]
    parts = {part.title: part for part in (*section.parts, *section.details)}
    repairs = [part for title, part in parts.items() if title.startswith("Repair")]
    assert [part.series[1].y for part in repairs if isinstance(part, Lines)] == [
        (block.repair.error_after,) for block in record.blocks
    ]
    assert ("num_hidden_layers", "3", "2") in section.parts[1].rows
    assert "num\\_hidden\\_layers" in to_markdown(document)


def test_an_unfinished_run_is_shown(smaller):
    record = StructureRecord.load(smaller)
    record.state, record.totals = "running", {}
    section = structure_section(record)
    assert section.parts[0].items == (("state", "unfinished: 2 blocks done"),)


# --- tables in a notebook ---


def elements(result) -> ElementTree.Element:
    """What a notebook shows, which is well-formed."""
    return ElementTree.fromstring(f"<div>{result._repr_html_()}</div>")


def cells_of(result) -> list[list[str]]:
    """The text of every cell, row by row."""
    return [["".join(cell.itertext()) for cell in row] for row in elements(result).iter("tr")]


def elements_named(result) -> set[str]:
    return {element.tag for element in elements(result).iter()}


@pytest.fixture
def manifest(run) -> Manifest:
    return Manifest.load(run)


def test_a_run_has_a_row_for_each_kind_of_linear_and_one_for_all(manifest):
    head, *kinds, total = cells_of(manifest)
    assert head == ["linear", "count", "weights", "zeros", "removed energy", "seconds"]
    assert [row[0] for row in kinds] == list(manifest.blocks[0].linears)
    assert total[:4] == ["all", "14", f"{manifest.totals['weights']:,}", "50.00%"]
    unfinished = manifest.model_copy(update={"state": "running"})
    assert "not finished" in unfinished._repr_html_()
    assert "not finished" not in manifest._repr_html_()
    slow = manifest.model_copy(update={"totals": {**manifest.totals, "seconds": 98.76}})
    assert "98.8 s" in slow._repr_html_() and float(cells_of(slow)[-1][-1]) < 98, (
        "a sum of its column"
    )


def test_an_inspection_has_a_row_for_each_linear(tmp_path):
    found = prunus.inspect(tiny_checkpoint(tmp_path / "dense"))
    assert len(cells_of(found)) == 1 + 14 + 1
    assert cells_of(found)[1] == [
        "model.layers.0.self_attn.q_proj",
        "32 × 32",
        "float32",
        "0.00%",
    ]
    assert cells_of(found)[-1][0] == "all"


def test_a_perplexity_shows_the_comparison_where_there_is_one():
    alone = PerplexityResult("wikitext2", 12.5, 2.5257, 4, 64, 16, "as in the papers", 1.0)
    found = Divergence("dense", 0.1234, 0.01, 0.9, 0.876, 0.02, 11.0, 1.1364, 0.01)
    assert ["perplexity", "12.500"] in cells_of(alone)
    assert not any("KL" in row[0] for row in cells_of(alone))
    compared = replace(alone, divergence=found)
    assert ["KL divergence", "0.12340 ± 0.01000"] in cells_of(compared)
    assert "Compared with dense: KL divergence (nats per token)" in compared._repr_html_()


def test_a_report_shows_its_tables_without_charts(tmp_path):
    sweep_results().save(tmp_path)
    shown = elements_named(prunus.report(tmp_path))
    assert "table" in shown and not {"script", "figure"} & shown


def test_names_are_escaped(tmp_path, manifest):
    hostile = sweep_results(name=HOSTILE, text=HOSTILE, error=HOSTILE)
    hostile.save(tmp_path)
    shown = (
        hostile,
        prunus.report(tmp_path, title=HOSTILE),
        manifest.model_copy(update={"source": HOSTILE}),
        PerplexityResult(HOSTILE, 1.0, 0.0, 1, 2, 2, HOSTILE, 1.0),
    )
    for result in shown:
        assert not {"script", "img"} & elements_named(result)
        assert "&lt;script&gt;" in result._repr_html_()
