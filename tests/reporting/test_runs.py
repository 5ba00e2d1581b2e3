"""Several runs compared, and the report on a smaller model."""

from __future__ import annotations

from statistics import mean

import pytest

import prunus
from prunus.engine.document import Lines
from prunus.reporting.page import to_html, to_markdown
from prunus.reporting.structure_section import structure_section
from prunus.structure.records import StructureRecord
from tiny import tiny_checkpoint, token_ids


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("comparison")
    dense = tiny_checkpoint(place / "dense")
    made = {}
    for name, options in {
        "low": {"method": "wanda", "sparsity": 0.3},
        "high": {"method": "wanda", "sparsity": 0.6},
        "gram": {"method": "sparsegpt", "sparsity": 0.6},
    }.items():
        made[name] = prunus.prune(dense, place / name, calibration=token_ids(2), **options)
    return place, made


def section(place, *names):
    return prunus.report([place / name for name in names]).sections[0]


def test_totals_stand_in_one_table(runs):
    place, made = runs
    first = section(place, "low", "high")
    assert first.title == "Runs compared"
    totals = first.parts[0]
    assert [column.title for column in totals.columns][:3] == ["run", "method", "sparsity"]
    assert "bits" not in [column.title for column in totals.columns]
    for row, name in zip(totals.rows, ("low", "high"), strict=True):
        assert row[:3] == (name, "wanda", made[name].totals["sparsity"])


def test_only_what_differs_is_listed(runs):
    differs = {row[0]: row[1:] for row in section(runs[0], "low", "high").parts[1].rows}
    assert differs == {"sparsity": ("0.3", "0.6")}
    differs = {row[0]: row[1:] for row in section(runs[0], "high", "gram", "low").parts[1].rows}
    assert differs["method"] == ("wanda", "sparsegpt", "wanda")
    assert differs["sparsity"] == ("0.6", "0.6", "0.3")


def test_one_run_stands_alone_and_runs_of_one_name_keep_their_paths(runs, tmp_path):
    place, _ = runs
    assert len(prunus.report(place / "low").sections) == 1
    assert len(prunus.report([place / "low", place / "low"]).sections) == 2
    (tmp_path / "low").mkdir()
    (tmp_path / "low" / "prunus.json").write_bytes((place / "low" / "prunus.json").read_bytes())
    first = prunus.report([place / "low", tmp_path / "low"]).sections[0]
    assert [row[0] for row in first.parts[0].rows] == [str(place / "low"), str(tmp_path / "low")]
    assert first.parts[1].rows == () and "same recipe" in first.parts[1].note


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    """A mixture of experts that lost a block, experts, channels and heads."""
    folder = tmp_path_factory.mktemp("structure")
    dense = tiny_checkpoint(folder / "dense", "mixtral", num_hidden_layers=3)
    prunus.shrink(
        dense, folder / "out", blocks=2, experts=3, width=0.25, calibration=token_ids(), batch=2
    )
    return folder / "out"


def test_figures_are_those_of_the_record(smaller):
    record = StructureRecord.load(smaller)
    document = prunus.report([smaller])
    section = document.sections[0]
    parts = {part.title: part for part in (*section.parts, *section.details)}
    (step,) = record.search
    assert parts["The search for blocks"].series[0].y == (step.value,)
    errors = parts["Relative error where what became narrower is read"].series[0]
    assert errors.y == pytest.approx(
        [100 * mean([part.error for part in block.width.values()]) for block in record.blocks]
    )
    repairs = [part for title, part in parts.items() if title.startswith("Repair")]
    assert [part.series[1].y for part in repairs if isinstance(part, Lines)] == [
        (block.repair.error_after,) for block in record.blocks
    ]
    assert ("num_hidden_layers", "3", "2") in section.parts[1].rows
    assert "num\\_hidden\\_layers" in to_markdown(document)
    assert "Relative error where what became narrower" in to_html(document)


def test_an_unfinished_run_is_shown(smaller):
    record = StructureRecord.load(smaller)
    record.state, record.totals = "running", {}
    section = structure_section(record)
    assert section.parts[0].items == (("state", "unfinished: 2 blocks done"),)
