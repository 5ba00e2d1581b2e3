"""Targets: one search over blocks and width, by what is measured, until the target is met."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from prunus.model.block_lists import find_block_list
from prunus.pruning.structure import target_plan, target_search
from prunus.pruning.structure.record import StructureRecord
from prunus.pruning.structure.target import parse_target
from structure_cases import bytes_of, shrink_killed_in_second_step
from structure_cases import shrink_without_repair as shrink
from tiny import tiny_checkpoint, token_ids

IDS = token_ids(6, 16)


def checkpoint(folder: Path, family: str = "llama") -> Path:
    options = {"n_layer": 4} if family in ("bloom", "gpt2") else {}
    return tiny_checkpoint(folder, family, num_hidden_layers=4, initializer_range=0.2, **options)


def sizes(folder: Path) -> tuple[int, int]:
    """Parameters in blocks, and bytes of all tensors, as stored."""
    parameters, total = 0, 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in list(file.keys()):
                tensor = file.get_tensor(key)
                total += tensor.nbytes
                parameters += tensor.numel() if "layers." in key else 0
    return parameters, total


def logits(folder: Path, gone: list[int]) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = find_block_list(model)[1]
    for index in gone:
        layers[index].register_forward_hook(lambda _m, args, _output: args[0])
    with torch.no_grad():
        return model(IDS[:3], use_cache=False).logits.double().log_softmax(-1)


def divergence(dense: Path, folder: Path, gone: list[int]) -> float:
    logp, logq = logits(dense, []), logits(folder, gone)
    return float((logp.exp() * (logp - logq)).sum(-1).mean())


@pytest.mark.parametrize("target", ["parameters=0.7", "speed=1.2x"])
def test_each_step_is_the_one_that_costs_least_per_byte(target, tmp_path):
    """Against a slow search over whole models, which fits on other windows than it measures on."""
    dense = checkpoint(tmp_path / "dense")
    record = shrink(dense, tmp_path / "small", target=target, calibration=IDS, dtype="float32")
    whole, head = sizes(dense)[0], 128 * 32 * 4
    kept, width, folder = [0, 1, 2, 3], 0.0, dense

    def narrow(width: float) -> Path:
        place = tmp_path / f"width{width}"
        shrink(dense, place, width=width, calibration=IDS[3:], dtype="float32")
        return place

    def cost(folder: Path, kept: list[int]) -> float:
        parameters = sizes(folder)[0] * len(kept) / 4
        return parameters if "parameters" in target else 4 * parameters + head

    def met(folder: Path, kept: list[int]) -> bool:
        every = [0, 1, 2, 3]
        share = cost(folder, kept) / cost(dense, every)
        return share <= 0.7 if "parameters" in target else 1 / share >= 1.2

    now = 0.0
    for step in record.search:
        assert not met(folder, kept)
        spent, found = cost(folder, kept), {}
        gone = [i for i in range(4) if i not in kept]
        for block in kept if len(kept) > 1 else []:
            value = divergence(dense, folder, [*gone, block])
            found[block] = (value - now) / (spent - cost(folder, [0] * (len(kept) - 1))), value
        if width < 0.5:
            narrower = narrow(width + 1 / 16)
            value = divergence(dense, narrower, gone)
            found[None] = (value - now) / (spent - cost(narrower, kept)), value
        best = min(found, key=lambda key: found[key][0])
        assert step.block == best
        assert step.value == pytest.approx(found[best][1], rel=1e-2)
        now = found[best][1]
        if best is None:
            width = width + 1 / 16
            assert step.width == width
            folder = narrower
        else:
            kept = [i for i in kept if i != best]
    assert met(folder, kept)
    assert record.totals["parameters"] < record.totals["parameters_before"]
    assert whole * (0.7 if "parameters" in target else 1) >= sizes(tmp_path / "small")[0]
    assert [block.made_from for block in record.blocks] == kept
    assert not list((tmp_path / "small").glob("search-*"))


@pytest.mark.parametrize(("family", "share"), [("bloom", 0.8), ("gpt2", 0.9), ("mixtral", 0.7)])
def test_the_result_takes_no_more_memory_than_the_target(family, share, tmp_path):
    """BLOOM counts no channels, so it loses blocks only; of GPT-2 the heads stay."""
    dense = checkpoint(tmp_path / "dense", family)
    limit = int(share * sizes(dense)[1])
    record = shrink(
        dense, tmp_path / "small", target=f"memory={limit}", calibration=IDS, repair=True
    )
    assert 0.5 * limit < sizes(tmp_path / "small")[1] <= limit
    blocks = [step.block for step in record.search if step.block is not None]
    assert len(record.blocks) == 4 - len(blocks)
    if family == "bloom":
        assert len(blocks) == len(record.search)
    if family == "gpt2":
        assert len(blocks) < len(record.search)
        assert {block.width.heads for block in record.blocks} == {None}
    AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_of_a_mixture_a_token_reads_the_experts_that_it_chooses(tmp_path, monkeypatch):
    dense = checkpoint(tmp_path / "dense", "mixtral")
    shrink(dense, tmp_path / "three", blocks=3, calibration=IDS)
    monkeypatch.setattr(target_plan, "_STEPS", 0)  # blocks alone
    every, three = sizes(dense)[0], sizes(tmp_path / "three")[0]
    experts = 4 * 4 * 3 * 32 * 64  # two of four are read
    ratio = (every - experts / 2 + 128 * 32) / ((every - experts / 2) * 3 / 4 + 128 * 32)
    assert three == every * 3 / 4
    found = {
        text: shrink(dense, tmp_path / text, target=text, calibration=IDS)
        for text in (f"speed={ratio - 0.001:.4f}x", f"speed={ratio + 0.001:.4f}x")
    }
    assert [len(record.blocks) for record in found.values()] == [3, 2]


def test_a_killed_search_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    dense = checkpoint(tmp_path / "dense")
    options: dict[str, Any] = {"target": "parameters=0.7", "calibration": IDS, "repair": True}
    whole = shrink(dense, tmp_path / "whole", **options)
    assert len(whole.search) > 1

    shrink_killed_in_second_step(
        monkeypatch, target_search, "_step", dense, tmp_path / "killed", **options
    )
    assert len(StructureRecord.load(tmp_path / "killed").search) == 1
    again = shrink(dense, tmp_path / "killed", resume=True, **options)
    assert again.search == whole.search
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "killed")
    assert not list((tmp_path / "killed").glob("search-*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "parameters=0.01"}, "cannot become so small; possible is anything between"),
        (
            {"target": "speed=1000x"},
            r"possible is anything between speed=\d+\.\d+x and speed=1.000",
        ),
        ({"target": "memory=1GB"}, "already meets it; possible is anything between memory=0.0"),
        ({"target": "parameters=1.5"}, "a target looks like parameters=0.75"),
        ({"target": "size=3GB"}, "a target looks like parameters=0.75"),
        ({"target": "memory=much"}, "a memory size looks like 8GB"),
        ({"target": "parameters=0.5", "blocks": 1}, "target and blocks do not go together"),
        ({"target": "parameters=0.5", "experts": 2}, "target and experts do not go together"),
    ],
)
def test_a_target_that_cannot_be_met_ends_before_any_work(options, said, tmp_path):
    dense = checkpoint(tmp_path / "dense")
    with pytest.raises(ValueError, match=said):
        shrink(dense, tmp_path / "small", calibration=IDS, **options)
    assert not (tmp_path / "small").exists()


def test_targets_are_read_with_and_without_their_unit():
    assert parse_target("speed=2").value == parse_target("speed = 2.0x").value == 2
    assert parse_target("memory=2KiB").value == 2048
    assert parse_target("parameters=.5").kind == "parameters"
