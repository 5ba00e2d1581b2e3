"""Blocks that go: the smaller model computes what the old one does when they are jumped over."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from prunus.structure import blocks
from prunus.structure.record import StructureRecord
from structure_cases import bytes_of, logits, shrink_killed_in_second_step
from structure_cases import shrink_without_repair as shrink
from tiny import EXPERT_FAMILIES, FAMILIES, NEWER_FAMILIES, tiny_checkpoint, token_ids

#: Hybrids that may lose their only attention layer here, without which transformers has no cache.
HYBRIDS = {"bamba", "granitemoehybrid", "jamba", "nemotron_h"}
ALL = sorted({*FAMILIES, *NEWER_FAMILIES, *EXPERT_FAMILIES})


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", ALL)
def test_the_result_is_the_old_model_with_blocks_jumped_over(family, tmp_path):
    dense, ids = tiny_checkpoint(tmp_path / "dense", family), token_ids()
    options: dict[str, Any] = {"blocks": 1, "block_rule": "cosine", "calibration": ids}
    record = shrink(dense, tmp_path / "small", **options)
    gone = [step.block for step in record.search]
    assert len(gone) == 1
    model, small = loaded(dense), loaded(tmp_path / "small")
    expected, found = logits(model, ids, gone), logits(small, ids)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert not torch.allclose(logits(model, ids), expected, rtol=1e-3)
    if family not in HYBRIDS:
        small.generate(ids[:1, :4], max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("rule", ["kl", "cosine"])
def test_a_block_that_the_configuration_cannot_do_without_stays(rule, tmp_path):
    """Every second block is a mixture of experts, counted from the first: only the last may go."""
    dense = tiny_checkpoint(tmp_path / "dense", "qwen2_moe", decoder_sparse_step=2)
    model = loaded(dense)
    for weight in model.model.layers[0].parameters():
        weight.data.mul_(0.01)  # the block that every measurement would choose
    model.save_pretrained(dense)
    record = shrink(dense, tmp_path / "small", blocks=1, block_rule=rule, calibration=token_ids())
    values = record.search[0].candidates
    assert values[0] < values[1]
    assert record.search[0].block == 1


def reference_divergence(model: Any, ids: Tensor, gone: Collection[int]) -> float:
    logp = logits(model, ids).double().log_softmax(-1)
    logq = logits(model, ids, gone).double().log_softmax(-1)
    return float((logp.exp() * (logp - logq)).sum(-1).mean())


def test_the_search_measures_and_chooses_as_a_slow_one(tmp_path):
    dense, ids = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=5), token_ids()
    record = shrink(dense, tmp_path / "small", blocks=2, calibration=ids, batch=2)
    model, gone = loaded(dense), []
    for number, step in enumerate(record.search):
        left = [i for i in range(5) if i not in gone]
        values = {i: reference_divergence(model, ids, [*gone, i]) for i in left}
        measured = {i: v for i, v in enumerate(step.candidates) if v is not None}
        assert measured.keys() == values.keys() if number == 0 else measured.keys() <= {*left}
        assert measured == pytest.approx({i: values[i] for i in measured}, rel=1e-3)
        assert step.block == min(measured, key=measured.__getitem__)
        assert step.value == measured[step.block]
        gone.append(step.block)
    assert [block.made_from for block in record.blocks] == sorted({*range(5)} - {*gone})


def test_the_cosine_rule_is_shortgpts(tmp_path):
    dense, ids = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=4), token_ids()
    record = shrink(
        dense, tmp_path / "small", blocks=2, block_rule="cosine", calibration=ids, batch=2
    )
    with torch.no_grad():
        states = loaded(dense).model(ids, output_hidden_states=True, use_cache=False).hidden_states
    # transformers puts the final norm on the last of the hidden states.
    pairs = list(itertools.pairwise(states[:4]))
    expected = [1 - float(torch.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairs]
    assert record.search[0].candidates[:3] == pytest.approx(expected, rel=1e-4)
    values = record.search[0].candidates
    assert [step.block for step in record.search] == sorted(range(4), key=values.__getitem__)[:2]


def test_a_killed_search_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    dense = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=6)
    options: dict[str, Any] = {"blocks": 3, "calibration": token_ids()}
    whole = shrink(dense, tmp_path / "whole", **options)

    shrink_killed_in_second_step(
        monkeypatch, blocks, "divergences", dense, tmp_path / "killed", **options
    )
    assert len(StructureRecord.load(tmp_path / "killed").search) == 1
    again = shrink(dense, tmp_path / "killed", resume=True, **options)
    assert [x.block for x in again.search] == [x.block for x in whole.search]
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "killed")


def test_blocks_and_experts_go_in_one_run(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "qwen3_moe", num_hidden_layers=3)
    record = shrink(dense, tmp_path / "small", blocks=2, experts=4, calibration=token_ids())
    small = loaded(tmp_path / "small")
    assert small.config.num_hidden_layers == 2
    assert all(len(block.experts.kept) == 4 for block in record.blocks)
    kept = [block.experts.kept for block in record.blocks]
    before = loaded(dense)
    for place, block in enumerate(record.blocks):
        old = before.model.layers[block.made_from].mlp.experts
        new = small.model.layers[place].mlp.experts
        assert torch.equal(new.down_proj, old.down_proj[kept[place]])


@pytest.mark.parametrize("amount", [0.9999, 2, 5])
def test_a_model_without_blocks_is_refused(amount, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"of the 2 blocks of .*: possible numbers to keep are 1"):
        shrink(dense, tmp_path / "small", blocks=amount, calibration=token_ids())
    assert not (tmp_path / "small").exists()
