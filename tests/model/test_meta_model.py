"""Models without weights: transformers computes their tables, and nothing else."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import AutoConfig, initialization

from prunus.model import meta_model
from prunus.model.kinds import kind_of
from tiny import tiny_checkpoint


@pytest.mark.parametrize(
    "family", ["bloom", "gptj", "gemma3_text", "deepseek_v3", "jamba", "gpt_oss"]
)
def test_buffers_are_those_of_a_model_that_was_given_initial_weights(family, tmp_path, monkeypatch):
    config = AutoConfig.from_pretrained(tiny_checkpoint(tmp_path, family))

    def built():
        return meta_model.build_on_meta(kind_of(config), config, torch.float32, False)

    found = built()
    monkeypatch.setattr(meta_model, "guard_torch_init_functions", contextlib.nullcontext)
    expected = built()
    buffers = dict(found.named_buffers())
    assert buffers.keys() == dict(expected.named_buffers()).keys()
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffers[name], buffer)
    assert {parameter.device.type for parameter in found.parameters()} == {"meta"}


def test_parameters_are_given_no_initial_values(tmp_path, monkeypatch):
    config = AutoConfig.from_pretrained(tiny_checkpoint(tmp_path, "llama"))
    for name in initialization.TORCH_INIT_FUNCTIONS:
        monkeypatch.setitem(
            initialization.TORCH_INIT_FUNCTIONS, name, lambda *_, **__: pytest.fail("too much work")
        )
    model = meta_model.build_on_meta(kind_of(config), config, torch.float32, False)
    assert model.lm_head.weight.is_meta
