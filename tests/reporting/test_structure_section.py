"""The report on a smaller model: its figures are those of the record."""

from __future__ import annotations

import pytest

import prunus
from prunus.reporting.page import to_html
from prunus.reporting.plain import to_markdown
from prunus.reporting.sources import read_document
from prunus.reporting.structure_section import structure_section
from prunus.runs.document import HeatMap, Lines, Table
from prunus.structure.record import StructureRecord, TargetModel
from tiny import tiny_checkpoint, token_ids


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
    document = read_document([smaller])
    section = document.sections[0]
    parts = {part.title: part for part in (*section.parts, *section.details)}
    (step,) = record.search
    assert parts["The search for blocks"].series[0].y == (step.value,)
    candidates = next(part for title, part in parts.items() if title.startswith("Without each"))
    assert candidates.values == (tuple(step.candidates),)
    experts = parts["Saliency of experts (reap)"]
    assert len(experts.rows) == 4
    assert [row[1] for row in experts.values] == record.blocks[1].experts.saliency
    errors = next(part for title, part in parts.items() if title.endswith("as it is"))
    assert isinstance(errors, HeatMap)
    assert errors.values[0] == tuple(block.width.heads.error for block in record.blocks)
    assert len(errors.rows) == 1 + 3, "heads, and the experts that stay"
    repairs = [part for title, part in parts.items() if title.startswith("Repair")]
    assert [part.series[1].y for part in repairs if isinstance(part, Lines)] == [
        (block.repair.error_after,) for block in record.blocks
    ]
    assert ("num_hidden_layers", "3", "2") in section.parts[1].rows
    assert "num\\_hidden\\_layers" in to_markdown(document)
    assert "Saliency of experts" in to_html(document)


def test_compared_models_and_unfinished_runs_are_shown(smaller):
    record = StructureRecord.load(smaller)
    record.targets = [TargetModel(blocks=3, width=0.25, heads=4, value=0.5)]
    record.state, record.totals = "running", {}
    section = structure_section(record)
    (table,) = [part for part in section.parts if getattr(part, "title", "").startswith("Models")]
    assert isinstance(table, Table)
    assert table.rows == ((3, 0.25, 4, 0.5),)
    assert section.parts[0].items == (("state", "unfinished: 2 blocks are done"),)
