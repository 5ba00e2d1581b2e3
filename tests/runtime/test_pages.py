"""Weights moved into large pages: the same model, ties and all, in no more memory."""

import copy
import mmap

import pytest
import torch

from prunus.hardware.memory import process_memory
from prunus.model.loading import load_model
from prunus.runtime import DenseLinear, fast_decoding, use_dense_kernel
from prunus.runtime.fast_decoding import use_large_pages
from tiny import tiny_model, token_ids

pytestmark = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages to ask for"
)


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(fast_decoding, "_SMALL", 1)
    monkeypatch.setattr(fast_decoding, "_CHUNK", 3 * 4096)
    monkeypatch.setattr(fast_decoding, "_PAGE", 4096)
    model = tiny_model("llama", torch.bfloat16, tie_word_embeddings=True)
    use_dense_kernel(model)
    return model


def test_same_weights_elsewhere(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    dense = [m.weight for m in model.modules() if isinstance(m, DenseLinear)]
    assert use_large_pages(model) == sum(weight.nbytes for weight in dense)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    name = "model.layers.0.mlp.up_proj.weight"
    assert after[name].data_ptr() != places[name]
    assert all(weight.data_ptr() % 64 == 0 for weight in dense)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(copy.deepcopy(model)(token_ids(1)).logits, model(token_ids(1)).logits)
    model.save_pretrained(tmp_path)
    weight = model.model.layers[0].mlp.up_proj.weight
    del model, dense
    weight.data.add_(1)  # memory stays while one tensor needs it


def test_what_was_read_does_not_stay_in_memory_too(tmp_path):
    tiny_model("llama", torch.bfloat16, hidden_size=1024, intermediate_size=8192).save_pretrained(
        tmp_path
    )
    model = load_model(tmp_path, dtype=torch.bfloat16)
    use_dense_kernel(model)
    with torch.no_grad():  # a graph for gradients would hold the weights as they were
        expected = model(token_ids(1)).logits  # every weight is read
    before = process_memory()
    moved = use_large_pages(model)
    assert moved > 80e6
    assert process_memory() - before < 0.6 * moved
    with torch.no_grad():
        assert torch.equal(model(token_ids(1)).logits, expected)


def test_a_system_without_large_pages(model, monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert use_large_pages(model) == 0
