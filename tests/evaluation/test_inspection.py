"""Inspection of a checkpoint and of a loaded model, and its size."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import prunus
from changes import edit_tensors
from prunus.evaluation.inspection import PATTERNS, holds, stored_size
from prunus.model.linears import find_linears, left_dense
from prunus.model.open_folder import OpenFolder
from tiny import tiny_checkpoint, tiny_model, token_ids


def nameless(inspection: prunus.Inspection) -> prunus.Inspection:
    return dataclasses.replace(inspection, model="")


@given(data=st.data(), rows=st.integers(1, 4), groups=st.integers(1, 4), m=st.integers(1, 8))
def test_holds_is_what_counting_says(data, rows, groups, m):
    n = data.draw(st.integers(1, m))
    kept = data.draw(st.integers(0, m))
    weight = torch.zeros(rows, groups * m)
    for row in range(rows):
        for group in range(groups):
            places = data.draw(st.permutations(range(m)))[: data.draw(st.integers(0, kept))]
            weight[row, [group * m + place for place in places]] = -1.5
    slow = all(
        sum(1 for value in row[start : start + m] if value != 0) <= n
        for row in weight.tolist()
        for start in range(0, groups * m, m)
    )
    assert holds(weight, n, m) is slow


def test_a_width_that_m_does_not_divide_does_not_hold():
    assert not holds(torch.zeros(2, 6), 2, 4)
    assert holds(torch.zeros(2, 8), 2, 4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_pruned_checkpoint_shows_its_pattern(family, tmp_path):
    """GPT-2 stores its weights as (in, out): counted along the wrong axis, 2:4 would not hold."""
    dense = tiny_checkpoint(tmp_path / "dense", family, torch.bfloat16)
    out = tmp_path / "out"
    report = prunus.prune(dense, out, pattern="2:4", calibration=token_ids())
    found = prunus.inspect(out)
    assert found.blocks == 2
    assert found.sparsity == pytest.approx(0.5, abs=1e-3)
    assert found.weights == report.totals["weights"]
    for linear in found.linears:
        assert "2:4" in linear.patterns, linear.name
        assert "1:4" not in linear.patterns, linear.name
        assert linear.dtype == "bfloat16"
        record = report.blocks[linear.block].linears[linear.name.split(f".{linear.block}.")[1]]
        assert (linear.shape, linear.zeros, linear.sparsity) == (
            record.shape,
            record.zeros,
            record.sparsity,
        )
    assert not any(linear.patterns for linear in prunus.inspect(dense).linears)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_path_and_a_loaded_model_give_the_same(family, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", family)
    prunus.prune(
        dense, tmp_path / "out", sparsity=0.5, calibration=token_ids(), ignore=["*.1.mlp.*"]
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    streamed, loaded = prunus.inspect(tmp_path / "out"), prunus.inspect(model)
    assert nameless(streamed) == nameless(loaded)
    assert (streamed.model, loaded.model) == (str(tmp_path / "out"), type(model).__name__)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # What was ignored is dense, the rest is not; the weights say the same.
    assert len({linear.sparsity > 0.4 for linear in streamed.linears}) == 2
    for linear in streamed.linears:
        weight = model.get_submodule(linear.name).weight
        assert linear.zeros == int((weight == 0).sum())
        expected = tuple(weight.T.shape) if family == "gpt2" else tuple(weight.shape)
        assert linear.shape == expected
        assert (linear.sparsity < 0.01) == (".1.mlp." in linear.name)


def test_counts_are_those_of_the_files_in_the_order_of_the_model(dense, tmp_path):
    stored = load_file(dense / "model.safetensors")
    found = prunus.inspect(dense)
    assert [linear.block for linear in found.linears] == [0] * 7 + [1] * 7
    assert [linear.name for linear in found.linears[7:9]] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
    ]
    assert found.weights == sum(stored[f"{linear.name}.weight"].numel() for linear in found.linears)
    assert found.sparsity == 0 and not found.left_dense
    content = json.loads(json.dumps(found.as_dict()))
    assert (content["blocks"], content["weights"]) == (2, found.weights)
    assert len(content["linears"]) == 14 and content["linears"][0]["shape"] == [32, 32]
    # Stricter patterns hold with the looser ones.
    prunus.prune(dense, tmp_path / "out", "magnitude", pattern="1:4")
    for linear in prunus.inspect(tmp_path / "out").linears:
        assert linear.patterns == tuple(f"{n}:{m}" for n, m in PATTERNS)
        assert linear.sparsity == 0.75


def test_weights_that_no_method_prunes_are_named():
    block = tiny_model("llama").model.layers[1]
    block.self_attn.position_bias = torch.nn.Embedding(3, 4)
    block.mlp.convolution = torch.nn.Conv1d(4, 2, 3)
    block.mlp.scale = torch.nn.Parameter(torch.ones(5))
    assert left_dense(block, find_linears(block)) == {
        "self_attn.position_bias.weight": (3, 4),
        "mlp.convolution.weight": (2, 4, 3),
    }
    block.mlp.experts = torch.nn.Parameter(torch.ones(2, 3, 4))
    with pytest.raises(NotImplementedError, match=r"mlp\.experts of shape \(2, 3, 4\) looks like"):
        left_dense(block, find_linears(block))


# --- size ---


@pytest.mark.parametrize(
    ("family", "dtype", "bits"),
    [("llama", torch.float32, 32), ("mixtral", torch.float16, 16), ("gpt2", torch.bfloat16, 16)],
)
def test_the_size_of_a_model_is_that_of_its_files_and_linears(family, dtype, bits, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", family, dtype)
    assert stored_size(OpenFolder(dense)).bits_per_weight == bits
    assert stored_size(OpenFolder(dense)).file_bytes == (dense / "model.safetensors").stat().st_size


def test_the_size_of_a_model_of_an_unknown_kind_is_that_of_its_files(dense, tmp_path):
    edit_tensors(dense, lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight"))
    found = stored_size(OpenFolder(dense))
    assert found.bits_per_weight is None
    assert found.file_bytes > 0
