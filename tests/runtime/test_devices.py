"""Packed models on a CUDA device: expanded once, with the results of the reference path."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from devices import assert_same_tensors
from packed_reference import pruned_checkpoint
from plane_reference import quantized_checkpoint
from prunus import pack
from prunus.runtime import linear as packed_linear
from prunus.runtime import reference_path
from prunus.runtime.linear import PackedLinear
from tiny import token_ids

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:prunus has kernels")]

IDS = token_ids(2, 12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    source = pruned_checkpoint(root / "pruned", "qwen2", tie_word_embeddings=True)
    for values in ("bf16", "int8"):
        pack(source, root / values, values)
    quantized_checkpoint(source, root / "planes")
    return root


def logits(model, device):
    with torch.no_grad():
        return model(IDS.to(device)).logits


@pytest.mark.parametrize("form", ["bf16", "int8", "planes"])
def test_logits_are_those_of_the_reference_path(form, folders, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(folders / form, dtype="auto")
    with reference_path():
        expected = logits(model, "cpu")
    expanded = []
    expand = packed_linear.expand

    def counted(packed, *given):
        expanded.append(packed)
        return expand(packed, *given)

    monkeypatch.setattr(packed_linear, "expand", counted)
    model.to("cuda:0")
    for _ in range(2):
        assert_same_tensors(expected, logits(model, "cuda:0"))
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == len(expanded) == 15, "14 linears, and the embedding with its head"
    assert_same_tensors(expected, logits(copy.deepcopy(model), "cuda:0"))
    with reference_path():
        assert torch.equal(logits(model.to("cpu"), "cpu"), expected)


def test_a_device_without_kernels_says_what_to_do(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "bf16", dtype="auto").to("cuda:0")
    packed_linear.warn_of_expansion.cache_clear()
    with pytest.warns(RuntimeWarning, match="`prunus unpack` writes a checkpoint") as caught:
        logits(model, "cuda:0")
    assert len([one for one in caught if "prunus has kernels" in str(one.message)]) == 1
