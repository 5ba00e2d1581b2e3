"""Configurations of adapters that ask peft for more than the adapter holds."""

import json

import pytest
import torch
from safetensors.torch import save_file

from prunus.model.adapter import check_adapter_config
from prunus.model.checkpoint.reader import Checkpoint

GOOD = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "mlp.up_proj"]}


def check(tmp_path, changes):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(GOOD | changes))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.ones(4, 8)}, tmp_path / "adapter_model.safetensors")
    tensors = Checkpoint(tmp_path, only=["adapter_model.safetensors"]).tensors
    check_adapter_config(path, tensors)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_modules": "all-linear", "modules_to_save": ["lm_head"], "layers_pattern": None},
        {"r": 2, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.0.q_proj": 8}},
    ],
)
def test_plain_names_and_stored_ranks_pass(changes, tmp_path):
    check(tmp_path, changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": "(a+)+$"}, "takes for a regular expression"),
        ({"target_modules": ["q_proj", "(a|a)*b"]}, "no plain name"),
        ({"exclude_modules": "(a+)+$"}, "exclude_modules is"),
        ({"modules_to_save": [["lm_head"]]}, "modules_to_save holds"),
        ({"layers_pattern": "(x+x+)+y"}, "layers_pattern holds"),
        ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern holds"),
        ({"alpha_pattern": {".*": 4}}, "alpha_pattern holds"),
        ({"rank_pattern": ["q_proj"]}, "must map names to numbers"),
        ({"target_modules": ["x"] * 10_001}, "at most 10,000 names"),
        ({"r": 10**9}, "r = 1000000000, and the largest rank of a stored tensor is 4"),
        ({"r": True}, "r = True"),
        ({"rank_pattern": {"q_proj": 10**9}}, r"rank_pattern.q_proj = 1000000000"),
        ({"layer_replication": [[0, 10**9]]}, "sets layer_replication"),
        ({"megatron_config": {"x": 1}}, "sets megatron_config"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type 'PREFIX_TUNING'"),
    ],
)
def test_everything_else_is_refused_by_name(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check(tmp_path, changes)
