"""Models without weights: their tables are those that transformers loads a model with."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from prunus.model.kinds import kind_of
from prunus.model.meta_model import build_on_meta
from tiny import tiny_checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "family", ["bloom", "gptj", "gpt_neo", "gemma3_text", "deepseek_v3", "jamba", "gpt_oss"]
)
def test_tables_are_those_of_a_loaded_model(family, dtype, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(tmp_path, family), dtype=dtype)
    found = build_on_meta(kind_of(model.config), model.config, dtype, False)
    assert {parameter.device.type for parameter in found.parameters()} == {"meta"}
    tables = dict(found.named_buffers())
    assert tables.keys() == dict(model.named_buffers()).keys()
    for name, expected in model.named_buffers():
        if name not in model.state_dict():
            assert expected.dtype == tables[name].dtype, name
            assert torch.equal(tables[name], expected), name
