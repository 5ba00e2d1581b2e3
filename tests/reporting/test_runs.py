"""The report on a smaller model."""

from __future__ import annotations

import pytest

import prunus
from prunus.engine.document import Lines
from prunus.reporting.page import to_markdown
from prunus.reporting.run_sections import structure_section
from prunus.structure.records import StructureRecord
from tiny import tiny_checkpoint, token_ids


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
