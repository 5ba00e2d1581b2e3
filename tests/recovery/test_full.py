"""Mode full: all weights of a smaller model learn from the dense one."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from prunus.structure.record import StructureRecord
from prunus.structure.run import shrink
from recovery_cases import dense_checkpoint, pruned_checkpoint, recover, shards, training_text
from tiny import token_ids


def test_a_smaller_model_learns_from_the_dense_one(tmp_path):
    dense, text = dense_checkpoint(tmp_path / "dense"), training_text(tmp_path)
    recover(dense, tmp_path / "teacher", "full", text, tokens=6400)
    teacher = tmp_path / "teacher"
    small = tmp_path / "small"
    options = {"blocks": 1, "width": 0.5, "repair": False}
    shrink(teacher, small, calibration=token_ids(), dtype="float32", **options)
    before = shards(small)
    record = recover(small, tmp_path / "out", "full", text, teacher=teacher)
    assert shards(small) == before
    first, best = record.evaluations[0], record.evaluations[record.best]
    assert best.held_out_loss < 0.8 * first.held_out_loss
    assert record.linears == {}
    assert record.totals["trained_parameters"] == record.totals["parameters"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    old = AutoModelForCausalLM.from_pretrained(small).state_dict()
    assert all(not torch.equal(x, old[name]) for name, x in model.state_dict().items())
    assert model.config.num_attention_heads == 2
    assert "Trained: all its weights" in (tmp_path / "out" / "README.md").read_text()
    kept = json.loads((tmp_path / "out" / StructureRecord.FILE).read_text())
    assert kept["config"]["num_hidden_layers"] == [2, 1]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_killed_training_goes_on_to_the_same_bytes(family, tmp_path):
    dense, text = dense_checkpoint(tmp_path / "dense", family), training_text(tmp_path)
    recover(dense, tmp_path / "whole", "full", text)

    class Killed(BaseException):
        pass

    def kill(step):
        if step.perplexity is not None and step.fraction > 0.4:
            raise Killed

    with pytest.raises(Killed):
        recover(dense, tmp_path / "killed", "full", text, progress=kill)
    recover(dense, tmp_path / "killed", "full", text, resume=True)
    assert shards(tmp_path / "whole") == shards(tmp_path / "killed")


def test_models_that_mode_full_would_damage(tmp_path):
    dense, text = dense_checkpoint(tmp_path / "dense"), training_text(tmp_path)
    pruned = pruned_checkpoint(tmp_path / "pruned", dense, sparsity=0.5)
    with pytest.raises(ValueError, match="zeros mode full would fill: choose mode masked"):
        recover(pruned, tmp_path / "out", "full", text)
    assert not (tmp_path / "out").exists()
