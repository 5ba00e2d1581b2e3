"""Mode full: all weights of a smaller model learn from the dense one."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from prunus.structure.records import StructureRecord
from prunus.structure.run import shrink
from recovery_cases import StopError, dense_checkpoint, recover, shards, stop_at
from tiny import token_ids


def test_a_smaller_model_learns_from_the_dense_one(dense, text, tmp_path):
    recover(dense, tmp_path / "teacher", "full", text, tokens=6400)
    teacher = tmp_path / "teacher"
    small = tmp_path / "small"
    options = {"blocks": 1, "repair": False}
    shrink(dense, small, calibration=token_ids(), dtype="float32", **options)
    before = shards(small)
    record = recover(small, tmp_path / "out", None, text, teacher=teacher)
    assert record.recipe.mode == "full"
    assert shards(small) == before
    first, best = record.evaluations[0], record.evaluations[record.best]
    assert best.held_out_loss < 0.8 * first.held_out_loss
    assert record.linears == {}
    assert record.totals["trained_parameters"] == record.totals["parameters"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    old = AutoModelForCausalLM.from_pretrained(small).state_dict()
    assert all(not torch.equal(x, old[name]) for name, x in model.state_dict().items())
    assert model.config.num_hidden_layers == 1
    assert "Trained: all its weights" in (tmp_path / "out" / "README.md").read_text()
    kept = json.loads((tmp_path / "out" / StructureRecord.FILE).read_text())
    assert kept["config"]["num_hidden_layers"] == [2, 1]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_killed_training_goes_on_to_the_same_bytes(family, text, tmp_path):
    dense = dense_checkpoint(tmp_path / "dense", family)
    recover(dense, tmp_path / "whole", "full", text)
    with pytest.raises(StopError):
        recover(dense, tmp_path / "killed", "full", text, progress=stop_at(0.6))
    recover(dense, tmp_path / "killed", "full", text, resume=True)
    assert shards(tmp_path / "whole") == shards(tmp_path / "killed")
