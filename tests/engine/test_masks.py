"""Masks of a whole model: as bits in a file, and as what prune removes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import prunus
from prunus.engine.masks import Masks
from refusals import assert_refused
from tiny import tiny_checkpoint, tiny_model, token_ids, weights

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def wanda(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("masks")
    dense, folder = tiny_checkpoint(scratch / "dense"), scratch / "wanda"
    prunus.prune(dense, folder, sparsity=0.5, calibration=token_ids(), ignore=["*.1.mlp.*"])
    return folder


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**30))
def test_masks_are_the_same_after_they_are_packed(rows, columns, seed):
    zero_OI = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    masks = Masks.pack({"a": zero_OI, "b": ~zero_OI})
    assert torch.equal(masks["a"], zero_OI) and torch.equal(masks["b"], ~zero_OI)
    assert masks.sparsity(masks) == 0.5
    assert masks.packed_OB["a"].shape == (rows, -(-columns // 8))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_masks_of_a_pruned_folder_are_its_zeros_and_prune_to_the_same_bytes(family, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", family, torch.bfloat16)
    prunus.prune(dense, tmp_path / "wanda", sparsity=0.5, calibration=token_ids())
    found = prunus.masks(tmp_path / "wanda", tmp_path / "masks.safetensors")
    linears = prunus.inspect(tmp_path / "wanda").linears
    assert [*found] == [linear.name for linear in linears]
    for linear in linears:
        assert found[linear.name].shape == linear.shape
        assert int(found[linear.name].sum()) == linear.zeros
    expected = weights(tmp_path / "wanda")
    ways = (tmp_path / "masks.safetensors", tmp_path / "wanda", dict(found), found)
    for number, given_masks in enumerate(ways):
        out = tmp_path / f"again{number}"
        record = prunus.prune(dense, out, masks=given_masks)
        assert record.recipe.method == "mask"
        assert record.inputs.masks_sha256 == found.sha256
        again = weights(out)
        assert again.keys() == expected.keys()
        assert all(torch.equal(again[name], weight) for name, weight in expected.items())
