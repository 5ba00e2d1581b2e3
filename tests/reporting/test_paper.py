"""Reports for papers: tables in LaTeX and CSV, figures, and a DataFrame."""

import csv
import io
import json
import re

import pytest
from rich.console import Console

import prunus
from command_line import call
from prunus.document import Document, Lines, Section, Series
from prunus.pruning.manifest import Manifest
from prunus.reporting.console import to_terminal
from prunus.reporting.figure import to_figure
from prunus.reporting.page import figure_json, to_html, to_markdown
from prunus.reporting.paper import to_csv, to_latex
from prunus.reporting.sweep_section import sweep_section
from prunus.sweeping.results import SweepResults
from report_samples import HOSTILE, compared_evaluation, evaluation, sweep_results, write
from tiny import ids_file, tiny_checkpoint


@pytest.fixture
def swept(tmp_path):
    """The folder of a sweep over two seeds and three sparsities."""
    folder = tmp_path / "sweep"
    folder.mkdir()
    sweep_results(other=0.6).save(folder)
    return folder


def charts(section: Section) -> dict[str, Lines]:
    return {part.title: part for part in section.parts if isinstance(part, Lines)}


def latex_rows(text: str) -> list[list[str]]:
    """The cells of every table, after a check of what pdflatex would stumble over."""
    body = "".join(line + "\n" for line in text.splitlines() if not line.startswith("%"))
    bare = re.sub(r"\\[\\{}&%$#_]", "", body)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
    assert not re.search(r"[#%_<>\x80-\xbf\u0100-\uffff]", bare)
    assert not re.search(r"(\\\\|rule)\s*[\[*]", body), "an argument of what comes before"
    labels = re.findall(r"\\label\{([a-z0-9:-]+)\}", body)
    assert len(set(labels)) == len(labels) == body.count(r"\toprule")
    assert re.findall(r"begin\{(\w+)", body) == ["table", "tabular"] * body.count(r"\toprule")
    tables = re.findall(r"begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular", body, re.DOTALL)
    rows = []
    for sides, table in tables:
        found = [
            re.split(r"(?<!\\) & ", line.strip().removesuffix(r" \\"))
            for line in table.splitlines()
            if line.endswith(r" \\")
        ]
        assert {len(row) for row in found} == {len(sides)}
        rows += found
    return rows


def test_means_over_seeds_stand_with_their_deviation_and_number_in_every_form(swept):
    document = prunus.report(swept)
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(to_terminal(document))
    for text in (to_html(document), to_markdown(document), console.export_text()):
        assert "32.000 ± 1.061" in text and "61.500 (1 seed)" in text
        assert "Mean ± standard deviation over 2 seeds" in text
    text = to_latex(document)
    assert r"32.000 $\pm$ 1.061" in text and "61.500 (1 seed)" in text
    assert r"Mean $\pm$ standard deviation over 2 seeds" in text
    chart = charts(document.sections[0])["Perplexity on wikitext2 by sparsity"]
    wanda = next(line for line in chart.series if line.name == "wanda")
    assert wanda.error == (pytest.approx(1.5 / 2**0.5), 0, 0)
    bars = [trace.get("error_y") for trace in json.loads(figure_json(chart))["data"]]
    assert [bar["visible"] for bar in bars if bar] == [False, True, False]


def test_latex_has_a_row_for_each_method_and_the_best_of_each_column_in_bold(swept):
    rows = latex_rows(to_latex(prunus.report(swept)))
    assert rows[:5] == [
        ["method", r"50\%", r"60\%", r"70\%"],
        ["dense", "20.500", "20.500", "20.500"],
        ["magnitude", "522.02 (1 seed)", "--", "--"],  # five digits
        ["wanda", r"32.000 $\pm$ 1.061", "61.500 (1 seed)", "61.500 (1 seed)"],
        ["wanda, recovered by lora", r"\textbf{27.500 (1 seed)}", "--", "--"],
    ]
    unit = ["wanda", r"1.000 $\pm$ 0.000", "1.000 (1 seed)", "1.000 (1 seed)"]
    assert unit in rows, "Wanda's residual gap is 1 by definition, and no result"
    place = rows.index(["dense", *[r"70.00\%"] * 3])  # a dense model does not compete
    accuracies = {name: accuracy for name, accuracy, *_ in rows[place + 1 :]}
    assert accuracies["magnitude"] == r"\textbf{50.00\% (1 seed)}", "equal ones are all the best"
    assert accuracies["wanda"] == r"\textbf{50.00\% $\pm$ 0.00\%}"


def test_a_sweep_of_several_models_has_a_column_for_each():
    results, other = sweep_results(), sweep_results("other")
    results.models |= other.models
    results.cells += other.cells
    section = sweep_section(results)
    assert latex_rows(to_latex(Document("", (section,))))[0] == [
        "method", r"smol, 50\%", "smol, 2:4", r"other, 50\%", "other, 2:4",
    ]  # fmt: skip
    results.cells = [cell for cell in results.cells if not cell.recipe.n_of_m]
    section = sweep_section(results)
    assert latex_rows(to_latex(Document("", (section,))))[0] == ["method", "smol", "other"]


def test_csv_and_data_frame_have_a_row_for_each_cell_with_every_figure(swept):
    results = SweepResults.load(swept)
    found = list(csv.DictReader(io.StringIO(to_csv(prunus.report(swept)))))
    assert len(found) == 1 + len(results.cells)
    assert list(found[0])[:6] == ["cell", "model", "method", "pattern", "sparsity", "seed"]
    row = next(row for row in found if row["cell"] == "smol-wanda-0.5-1")
    expected = {
        "model": "smol", "method": "wanda", "sparsity": "0.5", "seed": "1", "recovery": "",
        "perplexity_wikitext2": "32.75", "boolq_acc": "0.5", "boolq_acc_stderr": "0.0123",
        "removed_energy": "0.0375", "pruning_seconds": "12.25", "zeros": "0.5",
    }  # fmt: skip
    assert {key: row[key] for key in expected} == expected
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(io.StringIO(to_csv(prunus.report(swept))))
    pandas.testing.assert_frame_equal(results.frame(), frame, check_dtype=False)


def test_an_evaluation_is_a_table_for_a_paper(tmp_path):
    compared = prunus.report(write(tmp_path / "e.json", compared_evaluation("r/a", "r/b")))
    [row, _] = csv.DictReader(io.StringIO(to_csv(compared)))
    assert (row["model"], row["kl_divergence_wikitext2"], row["file_gb"]) == ("r/a", "0.25", "1.0")
    rows = latex_rows(to_latex(prunus.report(write(tmp_path / "f.json", evaluation("a", "b")))))
    assert rows[:2] == [["model", "text", "perplexity"], ["a", "wikitext2", r"\textbf{19.125}"]]
    assert ["a", r"\textbf{75.00\% $\pm$ 25.00\%}"] in rows


def test_hostile_names_are_text_in_latex_and_in_spreadsheets(tmp_path, run):
    results = sweep_results(HOSTILE + "中~^é", HOSTILE, HOSTILE, other=0.6)
    names = ("=1+1", "[own]", "*own", "-own", "@own", "\town", "-1.5", "+own")
    for cell, name in zip(results.cells, names, strict=True):
        cell.method_name = name
    results.save(tmp_path)
    text = to_latex(prunus.report([tmp_path, run, tmp_path]))
    latex_rows(text)
    assert r"\textbf" in text and "self" in text
    found = csv.DictReader(io.StringIO(to_csv(prunus.report(tmp_path))))
    assert [row["method"] for row in found] == [
        "dense", "'=1+1", "[own]", "*own", "'-own", "'@own", "'\town", "-1.5", "'+own"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ending", "begin"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")]
)
def test_the_charts_of_a_sweep_are_a_figure_of_the_same_bytes(swept, tmp_path, ending, begin):
    pytest.importorskip("matplotlib")
    files = [tmp_path / f"{name}.{ending}" for name in "ab"]
    for file in (*files, files[0]):  # it replaces a figure of its own
        call("report", swept, "-o", file)
    assert files[0].read_bytes().startswith(begin)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_layer_errors_of_runs_are_a_line_for_each_in_one_chart(run, tmp_path):
    dense, ids = tiny_checkpoint(tmp_path / "dense"), ids_file(tmp_path / "ids.safetensors", 4, 16)
    other = tmp_path / "other"
    how = {"calibration": str(ids), "samples": 4, "seqlen": 16, "allocation": "fisher"}
    prunus.prune(dense, other, "ria", **how)
    beside, *runs = prunus.report([run, other]).sections
    [chart] = charts(beside).values()
    assert [line.name for line in chart.series] == ["wanda", "ria"]
    assert [line.x for line in chart.series] == [(0, 1)] * 2
    alone = charts(prunus.report(run).sections[0])
    assert chart.series[0].y == alone["Mean removed energy by block"].series[0].y
    assert [list(charts(section)) for section in runs] == [[], ["Sparsity of the linears by block"]]
    manifest = Manifest.load(other)
    drawn = charts(runs[1])["Sparsity of the linears by block"].series
    assert {line.name: line.y[0] / 100 for line in drawn} == pytest.approx(
        {name: linear.sparsity for name, linear in manifest.blocks[0].linears.items()}
    )
    linears = list(csv.DictReader(io.StringIO(to_csv(prunus.report([run, other])))))
    assert len(linears) == 28 and linears[-1]["method"] == "ria"
    assert linears[-1]["linear"] == "model.layers.1.mlp.down_proj"


def test_runs_that_differ_in_their_seed_are_one_line_of_the_mean(tmp_path):
    dense, ids = tiny_checkpoint(tmp_path / "dense"), tmp_path / "ids.safetensors"
    runs = [tmp_path / name for name in ("first", "second", "again", "ria")]
    windows = (4, 8, 4, 4)  # the text differs with the seed
    methods = ("wanda", "wanda", "wanda", "ria")
    for run, method, seed, count in zip(runs, methods, (0, 1, 0, 0), windows, strict=True):
        ids_file(ids, count, 64 // count)
        prunus.prune(dense, run, method, calibration=str(ids), samples=4, seqlen=8, seed=seed)
    alone = [charts(prunus.report(run).sections[0]).popitem()[1].series[0].y for run in runs[:2]]
    [chart] = charts(prunus.report([runs[0], runs[1], runs[3]]).sections[0]).values()
    assert [line.name for line in chart.series] == ["wanda (2 seeds)", "ria"]
    assert alone[0] != alone[1]
    assert chart.series[0].y == pytest.approx([sum(ys) / 2 for ys in zip(*alone, strict=True)])
    [chart] = charts(prunus.report(runs).sections[0]).values()
    assert len(chart.series) == 3  # a run that repeats another one is no other seed


def test_a_long_legend_fits_and_no_two_of_its_lines_look_alike():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    names = [f"method {number}" for number in range(27)]
    series = tuple(Series(name, (0.0, 1.0), (1.0, 2.0), ("", ""), (0.0, 0.0)) for name in names)
    document = Document("t", (Section("s", parts=(Lines("t", "block", "error", series),)),))
    with pytest.MonkeyPatch.context() as patch:
        drawn = []
        patch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
        to_figure("png", document)
    drawn[0].draw_without_rendering()
    [panel] = drawn[0].axes
    lines = [line for line in panel.get_lines() if line.get_marker() != "None"]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) >= 27
    legend, page = panel.get_legend().get_window_extent(), drawn[0].bbox
    assert page.y0 <= legend.y0 and legend.y1 <= page.y1 and legend.x1 <= page.x1
    assert panel.get_window_extent().width > 0.7 * page.width  # the legend takes none of it


def test_an_unknown_ending_is_refused_before_any_work(tmp_path):
    message = r"must end in \.html, \.md, \.csv, \.tex, \.svg, \.png or \.pdf"
    with pytest.raises(ValueError, match=message):
        prunus.report(tmp_path / "none", tmp_path / "x.xlsx")


def test_a_sweep_over_a_sparsity_and_a_pattern_is_drawn_with_both_by_name(tmp_path):
    chart = charts(sweep_section(sweep_results()))["Perplexity on wikitext2 by sparsity"]
    assert (chart.x_title, chart.x_names) == ("sparsity", ("50%", "2:4"))
    assert {line.name: line.x for line in chart.series}["wanda"] == (0, 1)
    axis = json.loads(figure_json(chart))["layout"]["xaxis"]
    assert (axis["tickvals"], axis["ticktext"]) == ([0, 1], ["50%", "2:4"])
    pytest.importorskip("matplotlib")
    sweep_results().save(tmp_path)
    prunus.report(tmp_path, output=tmp_path / "x.svg")
    assert "2:4" in (tmp_path / "x.svg").read_text()  # matplotlib names what it draws


def test_without_anything_to_plot_the_report_says_what_is_missing(tmp_path):
    results = sweep_results()
    results.cells = results.cells[:1]
    results.save(tmp_path)
    message = r"nothing to plot\. A figure needs a sweep over two or more sparsities or patterns"
    with pytest.raises(ValueError, match=message):
        prunus.report(tmp_path, output=tmp_path / "x.pdf")
    assert not (tmp_path / "x.pdf").exists()


def test_a_missing_library_is_named_with_its_extra(swept, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs matplotlib: pip install '\.\[plot\]'"):
        prunus.report(swept, output=swept / "x.svg")
    with pytest.raises(ModuleNotFoundError, match=r"needs pandas: pip install '\.\[plot\]'"):
        sweep_results().frame()
