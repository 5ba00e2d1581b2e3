"""Removed blocks: the smaller model computes what the old one does when they are jumped over."""

from typing import Any

import pytest
import torch

from prunus.structure import search
from prunus.structure.records import StructureRecord
from structure_cases import (
    assert_same_logits,
    bytes_of,
    divergence,
    loaded,
    logits,
    shrink_killed_in_second_step,
)
from structure_cases import shrink_without_repair as shrink
from tiny import EXPERT_FAMILIES, FAMILIES, tiny_checkpoint, token_ids

IDS = token_ids()
#: Hybrids that may lose their only attention layer here, without which transformers has no cache.
HYBRIDS = {"bamba", "granitemoehybrid", "jamba", "nemotron_h"}
#: Their configurations count blocks as Llama's does, and have no list with an entry per block.
LIKE_LLAMA = """
apertus arcee bitnet codegen cohere gemma glm gpt_neox granite ministral3 mistral nemotron olmo
olmo2 phi phi3 qwen3 seed_oss smollm3 stablelm starcoder2
"""
ALL = sorted({*FAMILIES, *EXPERT_FAMILIES} - {*LIKE_LLAMA.split()})


@pytest.mark.parametrize("family", ALL)
def test_the_result_is_the_old_model_with_blocks_jumped_over(family, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", family)
    record = shrink(dense, tmp_path / "small", blocks=1, calibration=IDS)
    gone = [step.block for step in record.search]
    assert len(gone) == 1
    model, small = loaded(dense), loaded(tmp_path / "small")
    assert_same_logits(logits(small, IDS), logits(model, IDS, gone), logits(model, IDS))
    if family not in HYBRIDS:
        small.generate(IDS[:1, :4], max_new_tokens=2, do_sample=False)


def test_a_block_that_the_configuration_needs_stays(tmp_path):
    """Every second block is a mixture of experts, counted from the first: only the last may go."""
    dense = tiny_checkpoint(tmp_path / "dense", "qwen2_moe", decoder_sparse_step=2)
    model = loaded(dense)
    for weight in model.model.layers[0].parameters():
        weight.data.mul_(0.01)  # the block that the measurement would choose
    model.save_pretrained(dense)
    record = shrink(dense, tmp_path / "small", blocks=1, calibration=IDS)
    values = record.search[0].candidates
    assert values[0] < values[1]
    assert record.search[0].block == 1


def test_the_search_measures_and_chooses_as_a_slow_one(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=5)
    record = shrink(dense, tmp_path / "small", blocks=2, calibration=IDS, batch=2)
    model, gone = loaded(dense), []
    for number, step in enumerate(record.search):
        left = [i for i in range(5) if i not in gone]
        values = {i: divergence(model, model, IDS, [*gone, i]) for i in left}
        measured = {i: v for i, v in enumerate(step.candidates) if v is not None}
        assert measured.keys() == values.keys() if number == 0 else measured.keys() <= {*left}
        assert measured == pytest.approx({i: values[i] for i in measured}, rel=1e-3)
        assert step.block == min(measured, key=measured.__getitem__)
        assert step.value == measured[step.block]
        gone.append(step.block)
    assert [block.made_from for block in record.blocks] == sorted({*range(5)} - {*gone})


def test_a_killed_search_continues_to_the_same_bytes(tmp_path, monkeypatch):
    dense = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=6)
    options: dict[str, Any] = {"blocks": 3, "calibration": IDS}
    whole = shrink(dense, tmp_path / "whole", **options)
    killed = tmp_path / "killed"
    shrink_killed_in_second_step(monkeypatch, search, "divergences", dense, killed, **options)
    assert len(StructureRecord.load(killed).search) == 1
    again = shrink(dense, killed, resume=True, **options)
    assert [x.block for x in again.search] == [x.block for x in whole.search]
    assert bytes_of(tmp_path / "whole") == bytes_of(killed)


def test_blocks_and_experts_are_removed_in_one_run(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "qwen3_moe", num_hidden_layers=3)
    record = shrink(dense, tmp_path / "small", blocks=2, experts=4, calibration=IDS)
    before, small = loaded(dense), loaded(tmp_path / "small")
    assert small.config.num_hidden_layers == 2
    for place, block in enumerate(record.blocks):
        assert len(block.experts.kept) == 4
        old = before.model.layers[block.made_from].mlp.experts
        new = small.model.layers[place].mlp.experts
        assert torch.equal(new.down_proj, old.down_proj[block.experts.kept])
