"""Targets: one search over blocks and width, by what is measured, until the target is met."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from prunus.runs.options import RunOptions
from prunus.runs.windows import given_windows
from prunus.structure.records import StructureRecipe, StructureRecord, TargetModel, parse_target
from prunus.structure.run import run
from prunus.structure.search import TargetSearch
from prunus.structure.width_plan import TargetPlan
from structure_cases import bytes_of, divergence, loaded, shrink_killed_in_second_step, stored
from structure_cases import shrink_without_repair as shrink
from tiny import tiny_checkpoint, token_ids

IDS = token_ids(6, 16)


def checkpoint(folder: Path, family: str = "llama", blocks: int = 4) -> Path:
    options = {"n_layer": blocks} if family in ("bloom", "gpt2") else {}
    options |= {"num_hidden_layers": blocks, "initializer_range": 0.2}
    return tiny_checkpoint(folder, family, **options)


def sizes(folder: Path) -> tuple[int, int]:
    """Parameters in blocks, and bytes of all tensors, as stored."""
    tensors = stored(folder)
    parameters = sum(tensor.numel() for key, tensor in tensors.items() if "layers." in key)
    return parameters, sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(("target", "repair"), [("parameters=0.7", True), ("speed=1.3x", False)])
def test_the_best_of_the_models_that_meet_the_target_is_made(target, repair, tmp_path):
    """Without repair, each is made and measured again here, on the windows meant for it."""
    dense = checkpoint(tmp_path / "dense")
    options = {"dtype": "float32", "repair": repair}
    record = shrink(dense, tmp_path / "small", target=target, calibration=IDS, **options)
    whole = sizes(dense)[0]

    def met(folder: Path) -> bool:
        parameters, head = sizes(folder)[0], 128 * 32
        if "parameters" in target:
            return parameters <= 0.7 * whole
        return (whole + head) / (parameters + head) >= 1.3

    def made(folder: Path, ids: Tensor, width: float | None, each: TargetModel) -> Path:
        gone = 4 - each.blocks
        given = {"width": width, "heads": each.heads, "blocks": each.blocks if gone else None}
        recipe = StructureRecipe.read(None, {**given, **options, **given_windows(ids)[1]})
        run(dense, folder, recipe, RunOptions(input_ids=ids), record.search[:gone])
        return folder

    for number, each in enumerate(record.targets if not repair else []):
        folder = made(tmp_path / f"again{number}", IDS[3:], each.width, each)
        assert met(folder)
        assert each.value == pytest.approx(
            divergence(loaded(dense), loaded(folder), IDS[:3]), rel=1e-2
        )
        if each.width is not None and each.width > 1 / 16:
            wider = made(tmp_path / f"wider{number}", IDS[3:], each.width - 1 / 128, each)
            assert not met(wider)
    # With all blocks, heads stay or fewer stay; then half of the steps, then all of them.
    ways = [each.heads for each in record.targets if each.blocks == 4]
    assert ways == ([4, 2] if "parameters" in target else [4]), "no head is removed before a half"
    fewest = 4 - len(record.search)
    blocks = [each.blocks for each in record.targets[len(ways) :]]
    assert blocks == [(4 + fewest + 1) // 2, fewest]
    best = min(record.targets, key=lambda each: each.value)
    made(tmp_path / "best", IDS, best.width, best)
    assert bytes_of(tmp_path / "best") == bytes_of(tmp_path / "small")


@pytest.mark.parametrize(("family", "share"), [("bloom", 0.8), ("gpt2", 0.9), ("mixtral", 0.7)])
def test_the_result_takes_no_more_memory_than_the_target(family, share, tmp_path):
    """BLOOM counts no channels, so it loses blocks only; of GPT-2 the heads stay."""
    dense = checkpoint(tmp_path / "dense", family)
    limit = int(share * sizes(dense)[1])
    options = {"target": f"memory={limit}", "calibration": IDS, "repair": family == "gpt2"}
    record = shrink(dense, tmp_path / "small", **options)
    assert 0.5 * limit < sizes(tmp_path / "small")[1] <= limit
    if family == "bloom":
        assert not record.targets  # there is only one model that meets the target
        assert len(record.blocks) == 4 - len(record.search)
    if family == "gpt2":
        assert {each.heads for each in record.targets if each.width is not None} == {4}
    loaded(tmp_path / "small")


def test_of_a_mixture_a_token_reads_the_experts_that_it_chooses(tmp_path, monkeypatch):
    dense = checkpoint(tmp_path / "dense", "mixtral")
    shrink(dense, tmp_path / "three", blocks=3, calibration=IDS)
    monkeypatch.setattr(TargetPlan, "widths", lambda *_: [])  # blocks alone
    every, three = sizes(dense)[0], sizes(tmp_path / "three")[0]
    experts = 4 * 4 * 3 * 32 * 64  # two of four are read
    ratio = (every - experts / 2 + 128 * 32) / ((every - experts / 2) * 3 / 4 + 128 * 32)
    assert three == every * 3 / 4
    found = {
        text: shrink(dense, tmp_path / text, target=text, calibration=IDS)
        for text in (f"speed={ratio - 0.001:.4f}x", f"speed={ratio + 0.001:.4f}x")
    }
    assert [len(record.blocks) for record in found.values()] == [3, 2]


def test_a_killed_search_continues_to_the_same_bytes(tmp_path, monkeypatch):
    dense = checkpoint(tmp_path / "dense", blocks=3)
    options: dict[str, Any] = {"target": "parameters=0.7", "calibration": IDS, "repair": True}
    whole = shrink(dense, tmp_path / "whole", **options)

    shrink_killed_in_second_step(
        monkeypatch, TargetSearch, "_measure", dense, tmp_path / "killed", **options
    )
    assert len(StructureRecord.load(tmp_path / "killed").targets) == 1
    again = shrink(dense, tmp_path / "killed", resume=True, **options)
    assert (again.search, again.targets) == (whole.search, whole.targets)
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "killed")


def test_targets_are_read_with_and_without_their_unit():
    assert parse_target("speed=2").value == parse_target("speed = 2.0x").value == 2
    assert parse_target("memory=2KiB").value == 2048
    assert parse_target("parameters=.5").kind == "parameters"
