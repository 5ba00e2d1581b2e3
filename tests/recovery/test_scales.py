"""Mode scales: a compressed checkpoint is trained in its scales, steps, norms and biases."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from plane_reference import quantized_checkpoint, quantized_weight
from prunus import pack, unpack
from prunus.model.loading import load_model
from prunus.recovery.record import RecoveryRecord
from prunus.recovery.student import ScaledLinear, scales
from prunus.runtime.linear import PackedLinear
from prunus.runtime.operators import reference_path
from recovery_cases import dense_checkpoint, pruned_checkpoint, recover
from scripts import run_script
from tiny import stored
from tiny_tokenizer import byte_tokenizer


def compressed_of(dense, left=("nothing",)):
    """Quantise a checkpoint, but not linears whose names end in one of `left`."""
    folder = dense.parent / f"{dense.name}-compressed"
    return quantized_checkpoint(dense, folder, lambda name: not name.endswith(tuple(left)))


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """A tiny bfloat16 model with biases and norm weights that differ from 0 and 1."""
    folder = dense_checkpoint(tmp_path_factory.mktemp("scales") / "dense", "qwen2", torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(folder / "model.safetensors")
    for tensor in tensors.values():
        if tensor.dim() == 1:
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
        else:
            tensor *= 8  # Larger weights have gradients that are far above Adam's ε.
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def compressed(dense):
    return compressed_of(dense)


@pytest.fixture(scope="module")
def recovered(dense, compressed, text):
    """The folder of a recovery in the default mode."""
    out = dense.parent / "recovered"
    recover(compressed, out, None, text, teacher=dense)
    return out


def is_trained(name):
    """Whether a stored tensor is trained; the quantised head or embedding may be tied."""
    vectors = ("weight_scales", "weight_steps", ".bias", "norm.weight")
    return name.endswith(vectors) and not name.startswith("model.embed_tokens.")


# --- the result ---


def test_the_integers_keep_their_bytes_and_everything_continuous_moves(compressed, recovered):
    before, after = stored(compressed), stored(recovered)
    assert before.keys() == after.keys()
    assert {"lm_head.weight_steps", "model.norm.weight"} <= before.keys()
    assert any(name.endswith("q_proj.bias") for name in before)
    for name, tensor in before.items():
        assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(after[name], tensor) != is_trained(name), name
    for name in ("config.json", "tokenizer.json"):
        assert (recovered / name).read_bytes() == (compressed / name).read_bytes()
    totals = RecoveryRecord.load(recovered).totals
    trained = sum(x.numel() for name, x in before.items() if is_trained(name))
    assert (totals["trained_parameters"], totals["added_parameters"]) == (trained, 0)
    assert "All integers are those of the compressed model" in (recovered / "README.md").read_text()


def test_the_result_loads_and_is_closer_to_the_dense_model(dense, compressed, recovered, text):
    record = RecoveryRecord.load(recovered)
    assert record.recipe.mode == "scales"
    losses = [entry.training_loss for entry in record.evaluations[1:]]
    assert losses[-1] < losses[0]
    model = AutoModelForCausalLM.from_pretrained(recovered)
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)
    ids = text_ids(text)
    distances = [
        kl_divergence(load_model(dense, torch.float32), load_model(folder, torch.float32), ids)
        for folder in (compressed, recovered)
    ]
    assert distances[1].item() < distances[0].item()


def text_ids(text):
    """Two windows of 32 tokens of a text that a tokenizer of bytes cuts."""
    return torch.tensor(byte_tokenizer()(text.read_text())["input_ids"][:64]).view(2, 32)


def kl_divergence(teacher, student, ids):
    """The mean KL divergence of the student from the teacher, over all predicted tokens."""
    with torch.no_grad():
        p = teacher(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    q = student(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def test_a_result_can_be_trained_again_and_unpacked(recovered, text, tmp_path):
    record = recover(recovered, tmp_path / "again", "scales", text, tokens=64, evaluations=1)
    assert record.state == "finished"
    unpack(tmp_path / "again", tmp_path / "plain")
    assert load_model(tmp_path / "plain") is not None


# --- the mathematics ---


def test_gradients_are_those_of_the_dense_weight():
    """Of factors exp(α_i) and exp(β_j) at 0: the sums of dL/dW · W over rows and columns."""
    bias = torch.randn(24, generator=torch.Generator().manual_seed(1))
    linear = PackedLinear(quantized_weight(24, 70), bias)
    trained = ScaledLinear(linear, torch.float32)
    weight = linear.dense(torch.float32).requires_grad_()
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(2))
    reference = torch.nn.functional.linear(x, weight, bias)
    found = trained(x)
    torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-4)
    reference.square().sum().backward()
    found.square().sum().backward()
    change = weight.grad * weight.detach()
    torch.testing.assert_close(trained.log_scales.grad, change.sum(1), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(trained.log_steps.grad, change.sum(0), rtol=1e-4, atol=1e-2)


def test_integers_scales_and_steps_are_exact_in_bfloat16():
    linear = PackedLinear(quantized_weight(24, 70))
    trained = ScaledLinear(linear, torch.bfloat16)
    dense = (trained.levels_OI.float() * trained.steps()) * trained.scales()[:, None]
    assert torch.equal(dense, linear.dense(torch.float32))
    with torch.no_grad():
        trained.log_steps += 0.01
    assert torch.equal(trained.steps(), (linear.weight_steps.float() * 1.01005).bfloat16().float())


def test_one_step_is_one_step_of_adam(dense, compressed, tmp_path):
    """A first step of Adam moves each number by its rate, against the sign of its gradient."""
    ids, file = torch.arange(5, 21)[None], tmp_path / "ids.safetensors"
    save_file({"input_ids": ids.repeat(3, 1)}, file)
    options = {"tokens": 16, "batch": 1, "warmup": 0.0, "learning_rate": 0.05, "evaluations": 1}
    recover(compressed, tmp_path / "out", "scales", file, teacher=dense, **options)
    packed = load_model(compressed, torch.float32)
    plain = packed.hf_quantizer._dequantize(packed, torch.float32).requires_grad_(True)
    kl_divergence(load_model(dense, torch.float32), plain, ids).backward()
    before, after = stored(compressed), stored(tmp_path / "out")
    compared = 0
    step = 0.05 * 0.5  # Half way through a budget of one step, the cosine is at a half.
    for name, parameter in plain.named_parameters():
        linear = name.removesuffix(".weight")
        if f"{linear}.weight_scales" in before:
            change = parameter.grad * parameter.detach()
            for part, gradient in (("scales", change.sum(1)), ("steps", change.sum(0))):
                key = f"{linear}.weight_{part}"
                expected = before[key].float() * torch.exp(-step * gradient.sign())
                compared += compare(after[key], expected, gradient)
        elif parameter.dim() == 1:
            size = before[name].float().square().mean().sqrt()
            expected = before[name].float() - step * size * parameter.grad.sign()
            compared += compare(after[name], expected, parameter.grad)
    assert compared > 0.5 * sum(x.numel() for name, x in before.items() if is_trained(name))


def compare(found, expected, gradient):
    """Compare where the gradient is not so small that rounding or Adam's ε counts."""
    clear = gradient.abs() > 1e-6
    torch.testing.assert_close(found.float()[clear], expected[clear], rtol=1e-2, atol=1e-3)
    return int(clear.sum())


#: Routers, and embeddings that a family scales: no packed checkpoint holds them.
LEFT_DENSE = (".gate", "embed_tokens", "embed_positions")


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2", "opt"])
def test_other_families_compute_what_the_packed_model_computes(family, text, tmp_path):
    """Experts, tied heads and norms of other kinds; results have the stored names."""
    dense = dense_checkpoint(tmp_path / family, family, torch.bfloat16)
    folder = compressed_of(dense, LEFT_DENSE)
    trainable = scales(load_model(folder, torch.float32), torch.float32)
    ids = torch.arange(5, 21)[None]
    # The kernels round the activations of a few tokens.
    with torch.no_grad(), reference_path():
        found = trainable.model(input_ids=ids).logits
        expected = load_model(folder, torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    recover(folder, tmp_path / "out", None, text, tokens=64, dtype="bfloat16", evaluations=1)
    before, after = stored(folder), stored(tmp_path / "out")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name.endswith(("scales", "steps", ".bias", "norm.weight")) for name in moved)
    assert sum(name.endswith("steps") for name in moved) > 10


# --- files ---


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_run_killed_at_a_rename_resumes_to_the_same_bytes(compressed, text, tmp_path):
    models = (compressed, compressed, text, text)
    results = run_script("random_kills.py", *models, tmp_path, 0, "recover-scales/3")
    results = results["recover-scales"]
    assert len(results) >= 3
    for result in results:
        assert (result["status"], result["equal"], result["left_behind"]) == (0, True, [])


# --- what cannot work ---


def test_other_modes_other_models_and_other_teachers(dense, compressed, text, tmp_path):
    out = tmp_path / "out"
    expand = r"choose mode scales, or expand it first \(prunus unpack"
    for mode in ("lora", "masked"):
        with pytest.raises(ValueError, match=expand):
            recover(compressed, out, mode, text)
    pruned = pruned_checkpoint(tmp_path / "pruned", dense)
    pack(pruned, tmp_path / "packed")
    for folder in (dense, pruned, tmp_path / "packed"):
        with pytest.raises(ValueError, match=r"has no quantised linears.*prunus compress"):
            recover(folder, out, "scales", text)
    with pytest.raises(ValueError, match=r"the teacher .* is packed; give the dense model"):
        recover(compressed, out, None, text, teacher=compressed)
    with pytest.raises(ValueError, match="rank has no meaning in mode scales"):
        recover(compressed, out, None, text, rank=4)
    with pytest.raises(ValueError, match="could not be loaded"):
        recover(damaged_copy(compressed, tmp_path / "damaged"), out, None, text)
    assert not out.exists()


def damaged_copy(source, folder):
    """A copy of a compressed checkpoint with one plane that ends too early."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-8].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
