"""LoRA by peft on packed models: it trains, its gradients are right, and it is saved and loaded."""

import io
import pickle

import pytest
import torch
from torch import nn

import prunus
from packed_reference import pruned_checkpoint
from tiny_tokenizer import VOCABULARY, byte_tokenizer

peft = pytest.importorskip("peft", reason="adapters need the extra adapters")

IDS = torch.arange(24).remainder(7).unsqueeze(0)
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same pruned model as it is and packed."""
    place = tmp_path_factory.mktemp("lora")
    pruned = pruned_checkpoint(place / "pruned", vocab_size=VOCABULARY, hidden_size=64)
    byte_tokenizer().save_pretrained(pruned)
    prunus.pack(pruned, place / "packed")
    return pruned, place / "packed"


def adapted(folder, **options):
    """A model with LoRA layers whose values do not depend on the model."""
    config = peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(prunus.load(folder).model, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return model.train()


def loss_of(model) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def gradients(model) -> dict[str, torch.Tensor]:
    loss_of(model).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_the_dense_model(folders):
    dense, packed = (adapted(folder) for folder in folders)
    torch.testing.assert_close(loss_of(packed), loss_of(dense), rtol=0.01, atol=0.01)
    expected, found = gradients(dense), gradients(packed)
    assert set(found) == set(expected) and len(found) == 2 * 2 * len(TARGETS)
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        difference = (found[name].float() - gradient.float()).norm() / gradient.float().norm()
        assert difference < 0.03, name


def test_one_step_lowers_the_loss_and_only_the_adapter_changes(folders):
    model = adapted(folders[1])
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * len(TARGETS) and all(p.dtype == torch.float32 for p in trained)
    before = {n: b.clone() for n, b in model.named_buffers() if b is not None}
    first = loss_of(model)
    first.backward()
    torch.optim.SGD(trained, lr=0.1).step()
    assert loss_of(model) < first
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers() if b is not None)


def test_an_adapter_is_saved_and_loaded_on_the_packed_and_on_the_dense_model(folders, tmp_path):
    pruned, packed = folders
    model = adapted(packed).eval()
    model.save_pretrained(tmp_path / "adapter")
    again, tokenizer = prunus.load(tmp_path / "adapter")
    assert tokenizer("a")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        assert torch.equal(again(input_ids=IDS).logits, logits)
        other = peft.PeftModel.from_pretrained(prunus.load(pruned).model, tmp_path / "adapter")
        torch.testing.assert_close(other(input_ids=IDS).logits, logits, rtol=0.05, atol=0.05)
        with model.disable_adapter():
            alone = model(input_ids=IDS).logits
        assert torch.equal(alone, prunus.load(packed).model(input_ids=IDS).logits)
        assert not torch.equal(alone, logits)


def test_merging_and_dora_are_refused_with_the_way_out(folders):
    with pytest.raises(ValueError, match="cannot be merged into a packed model"):
        adapted(folders[1]).merge_and_unload()
    with pytest.raises(ValueError, match="DoRA needs the dense weight"):
        adapted(folders[1], use_dora=True)


def test_other_linears_get_the_layers_of_peft_itself():
    model = nn.Sequential()
    model.add_module("one", nn.Linear(4, 4))
    config = peft.LoraConfig(target_modules=["one"])
    assert isinstance(peft.inject_adapter_in_model(config, model).one, peft.tuners.lora.Linear)


def test_configurations_and_adapted_models_are_pickled(folders):
    for folder in folders:
        model = adapted(folder).eval()
        config = pickle.loads(pickle.dumps(model.peft_config["default"]))
        assert config.target_modules == set(TARGETS) and config._custom_modules is None
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        with torch.no_grad():
            assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
        assert again.base_model.model.num_parameters() == model.base_model.model.num_parameters()
