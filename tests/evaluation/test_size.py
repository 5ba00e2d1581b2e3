"""How large a model is: as stored, and as `prunus pack` would store it."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from packed_reference import pruned_checkpoint
from prunus import pack
from prunus.evaluation.size import file_bytes, packed_size, stored_size
from prunus.model.checkpoint.reader import Checkpoint
from prunus.model.loading import load_model
from tiny import tiny_checkpoint


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_packed_size_is_that_of_pack(family, dtype, tmp_path):
    pruned_checkpoint(tmp_path / "pruned", family, dtype)
    found = packed_size(tmp_path / "pruned")
    record = pack(tmp_path / "pruned", tmp_path / "packed")
    stored = {
        name: Checkpoint(tmp_path / name).nbytes(Checkpoint(tmp_path / name).tensors)
        for name in ("pruned", "packed")
    }
    saved = file_bytes(tmp_path / "pruned") - found.file_bytes
    assert saved == stored["pruned"] - stored["packed"]
    inside = [linear for name, linear in record.linears.items() if ".layers." in name]
    if family == "llama":
        weights = sum(linear.shape[0] * linear.shape[1] for linear in inside)
        bits = 8 * sum(linear.nbytes[1] for linear in inside) / weights
        assert found.bits_per_weight == pytest.approx(bits)
        assert stored_size(tmp_path / "packed").bits_per_weight == pytest.approx(bits)
    assert stored_size(tmp_path / "pruned").bits_per_weight == 16
    assert packed_size(tmp_path / "packed") is None


def test_transposed_weights_are_left_as_they_are(tmp_path):
    pruned_checkpoint(tmp_path / "pruned", "gpt2", torch.bfloat16)
    assert packed_size(tmp_path / "pruned").bits_per_weight == 16


def test_what_is_not_packed_has_only_a_stored_size(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense")
    assert packed_size(dense) is None
    assert stored_size(dense).bits_per_weight == 32
    assert stored_size(dense).file_bytes == (dense / "model.safetensors").stat().st_size


def test_the_size_of_a_model_of_an_unknown_kind_is_that_of_its_files(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    found = stored_size(dense)
    assert found.bits_per_weight is None
    assert found.file_bytes > 0
    assert packed_size(dense) is None


def test_an_adapter_counts_with_its_base(tmp_path):
    peft = pytest.importorskip("peft", reason="adapters need the extra adapters")
    dense = tiny_checkpoint(tmp_path / "dense")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(load_model(dense), config)
    adapted.save_pretrained(tmp_path / "adapter")
    found = stored_size(tmp_path / "adapter")
    assert found.file_bytes > file_bytes(dense)
    assert found.bits_per_weight is None
    assert packed_size(tmp_path / "adapter") is None
