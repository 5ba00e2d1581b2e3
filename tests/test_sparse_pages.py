"""Weights moved into large pages: the same model, ties and all."""

from __future__ import annotations

import copy
import mmap

import pytest
import torch

from prunus.sparse import DenseLinear, pages, use_dense_kernel, use_large_pages
from tiny import tiny_model, token_ids


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(pages, "_SMALL", 1)
    monkeypatch.setattr(pages, "_CHUNK", 3 * 4096)
    monkeypatch.setattr(pages, "_PAGE", 4096)
    model = tiny_model("llama", torch.bfloat16, tie_word_embeddings=True)
    use_dense_kernel(model)
    return model


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages to ask for")
def test_same_weights_elsewhere(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    moved = use_large_pages(model)
    dense = [m.weight for m in model.modules() if isinstance(m, DenseLinear)]
    assert moved == sum(weight.nbytes for weight in dense)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (
        after["model.layers.0.mlp.up_proj.weight"].data_ptr() != places["model.layers.0.mlp.up_proj.weight"]
    )
    assert all(weight.data_ptr() % 64 == 0 for weight in dense)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(copy.deepcopy(model)(token_ids(1)).logits, model(token_ids(1)).logits)
    model.save_pretrained(tmp_path)
    weight = model.model.layers[0].mlp.up_proj.weight
    del model
    weight.data.add_(1)  # memory stays while one tensor needs it


def test_a_system_without_large_pages(model, monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert use_large_pages(model) == 0
