"""Repair: the remaining blocks learn to compute what the dense model computes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from prunus.structure.shrink import shrink
from structure_cases import bytes_of, divergence, loaded, shrunk_with_a_kill, stored
from tiny import tiny_checkpoint, token_ids

#: What is removed, per family: blocks, experts and both at once.
CASES: dict[str, dict[str, Any]] = {
    "llama": {"blocks": 2},
    "gpt_neox": {"blocks": 2},
    "gpt_oss": {"experts": 2},
    "qwen3_moe": {"experts": 0.5, "blocks": 2},
    "deepseek_v3": {"experts": 0.5},
}


def dense_checkpoint(folder: Path, family: str) -> Path:
    # GPT-OSS has a list with an entry per block.
    options: dict[str, Any] = {} if family == "gpt_oss" else {"num_hidden_layers": 3}
    options["initializer_range"] = 0.2  # so that blocks matter
    return tiny_checkpoint(folder, family, **options)


@pytest.mark.parametrize("family", sorted(CASES))
def test_repair_brings_the_smaller_model_nearer_to_the_dense_one(family, tmp_path):
    dense, ids = dense_checkpoint(tmp_path / "dense", family), token_ids(12, 16)
    common: dict[str, Any] = {"calibration": ids, "dtype": "float32", **CASES[family]}
    shrink(dense, tmp_path / "plain", repair=False, **common)
    record = shrink(dense, tmp_path / "repaired", **common)
    plain, repaired = (
        divergence(loaded(dense), loaded(tmp_path / name), ids) for name in ("plain", "repaired")
    )
    assert repaired < 0.99 * plain
    repairs = [block.repair for block in record.blocks if block.repair is not None]
    assert all(repair.error_after <= repair.error_before for repair in repairs)
    assert repairs[-1].measure == "logits"
    assert {repair.measure for repair in repairs[:-1]} <= {"outputs"}
    before, after = stored(tmp_path / "plain"), stored(tmp_path / "repaired")
    assert {k: (x.shape, x.dtype) for k, x in before.items()} == {
        k: (x.shape, x.dtype) for k, x in after.items()
    }
    changed = {key for key, x in before.items() if not torch.equal(x, after[key])}
    assert not any("norm" in key or "embed" in key for key in changed)
    routers = {k for k in before if ("router" in k or ".gate." in k) and "bias" not in k}
    if "experts" in CASES[family]:
        assert routers & changed, "rows of a router that stay are trained"


def test_blocks_are_trained_from_the_first_change_on_and_towards_the_state_behind_a_gap(
    tmp_path, monkeypatch
):
    dense, ids = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=5), token_ids(8, 16)
    monkeypatch.setattr("prunus.structure.shrink.choose_blocks", lambda *_: [0, 1, 4])
    common: dict[str, Any] = {"blocks": 3, "calibration": ids, "dtype": "float32"}
    record = shrink(dense, tmp_path / "small", **common)
    assert [block.repair is not None for block in record.blocks] == [False, True, True]
    with torch.no_grad():
        states = loaded(dense).model(ids, output_hidden_states=True, use_cache=False).hidden_states
    # The last window validates; block 1 aims at the states in front of block 4.
    found, target = states[2][-1].double(), states[4][-1].double()
    error = (found - target).square().sum(-1) / target.square().sum(-1)
    assert record.blocks[1].repair.error_before == pytest.approx(float(error.mean()), rel=0.02)


def test_a_gap_at_the_end_is_repaired_towards_the_next_tokens(tmp_path, monkeypatch):
    dense, ids = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=4), token_ids(8, 16)
    monkeypatch.setattr("prunus.structure.shrink.choose_blocks", lambda *_: [0, 1])
    record = shrink(dense, tmp_path / "small", blocks=2, calibration=ids, dtype="float32")
    assert [block.repair is not None for block in record.blocks] == [False, True]
    expected = divergence(loaded(dense), loaded(dense), ids[-1:], [2, 3])
    assert record.blocks[1].repair.error_before == pytest.approx(expected, rel=0.02)


def test_a_killed_repair_trains_what_follows_a_change_that_was_finished(tmp_path, monkeypatch):
    """Block 3 lost nothing and is at no gap: it is trained because block 1 before it is."""
    dense = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=6)
    monkeypatch.setattr("prunus.structure.shrink.choose_blocks", lambda *_: [0, 2, 3, 4, 5])
    common: dict[str, Any] = {"blocks": 5, "calibration": token_ids(8, 16), "repair": True}
    whole = shrink(dense, tmp_path / "whole", **common)
    assert all(block.repair is not None for block in whole.blocks)
    shrunk_with_a_kill(dense, tmp_path / "killed", 3, **common)
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "killed")
