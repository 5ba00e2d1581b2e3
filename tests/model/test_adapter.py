"""Adapter folders as models: loaded, scored, refused where they do not fit their base."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunus
from changes import edit_json, edit_tensors
from prunus.evaluation.generation import generate
from prunus.evaluation.inspection import stored_size
from prunus.model.adapter import WEIGHTS_NAME, check_adapter
from prunus.model.checkpoint.resolve import CONFIG_NAME, base_folder, is_adapter
from prunus.model.loading import load_model
from prunus.model.tokenizer import load_tokenizer
from recovery_cases import training_text
from refusals import assert_refused
from tiny import tiny_checkpoint, token_ids
from tiny_tokenizer import VOCABULARY, dense_checkpoint

peft = pytest.importorskip("peft", reason="adapters need the extra adapters")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return dense_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    """What peft itself saves of a LoRA whose update is not zero."""
    return make_adapter(base, tmp_path / "adapter")


def make_adapter(base: Path, folder: Path) -> Path:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(load_model(base), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    adapted.save_pretrained(folder)
    return folder


def test_an_adapter_computes_base_plus_update(base, adapter):
    tensors = load_file(adapter / WEIGHTS_NAME)
    merged = load_model(base)
    with torch.no_grad():
        for name, B_OR in tensors.items():
            if "lora_B" in name:
                path = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
                A_RI = tensors[name.replace("lora_B", "lora_A")]
                merged.get_submodule(path).weight += (
                    8 / 2 * B_OR @ A_RI
                )  # lora_alpha is 8 by default
        ids = token_ids(2, 16)
        found, expected = load_model(adapter)(ids).logits, merged(ids).logits
        assert torch.allclose(found, expected, atol=1e-4)
        assert not torch.allclose(found, load_model(base)(ids).logits, atol=1e-2)


def test_an_adapter_that_is_not_finite_is_refused_by_name(adapter):
    name = max(load_file(adapter / WEIGHTS_NAME))
    edit_tensors(adapter / WEIGHTS_NAME, lambda tensors: tensors[name].fill_(torch.inf))
    assert_refused(ValueError, f"{name} holds weights that are not finite", prunus.load, adapter)


def test_everything_that_loads_models_takes_adapters(base, adapter, tmp_path):
    assert is_adapter(adapter)
    assert not is_adapter(base)
    assert base_folder(adapter) == base
    assert load_tokenizer(adapter).get_vocab() == load_tokenizer(base).get_vocab()
    text = training_text(tmp_path)
    found, plain = (
        prunus.perplexity(folder, str(text), seqlen=32).perplexity for folder in (adapter, base)
    )
    assert found != pytest.approx(plain, rel=1e-3)
    assert isinstance("".join(generate(adapter, "The", max_new_tokens=3)), str)
    sizes = [
        path.stat().st_size for folder in (adapter, base) for path in folder.glob("*.safetensors")
    ]
    assert stored_size(adapter).file_bytes == sum(sizes)
    assert stored_size(adapter).bits_per_weight is None


def test_the_base_is_found_beside_the_adapter(base, adapter, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "its-base")
    edit_json(adapter / CONFIG_NAME, base_model_name_or_path="../its-base")
    assert base_folder(adapter).resolve() == tmp_path / "its-base"
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    edit_json(adapter / CONFIG_NAME, base_model_name_or_path="model")
    assert base_folder(adapter).resolve() == tmp_path / "here" / "model"


@pytest.mark.parametrize(
    "options", [{"hidden_size": 48}, {"num_hidden_layers": 1}, {"num_key_value_heads": 4}]
)
def test_an_adapter_of_another_base_is_refused_without_reading_it(adapter, tmp_path, options):
    tiny_checkpoint(tmp_path / "other", vocab_size=VOCABULARY, **options)
    (tmp_path / "other" / "model.safetensors").unlink()
    edit_json(adapter / CONFIG_NAME, base_model_name_or_path=str(tmp_path / "other"))
    assert_refused(
        ValueError, r"does not fit its base .*was it trained on another", check_adapter, adapter
    )


def test_an_adapter_of_another_family_or_with_other_tensors_is_refused(base, adapter, tmp_path):
    tensors = load_file(adapter / WEIGHTS_NAME)
    name = next(iter(tensors))
    more = tensors | {name.replace("layers.0", "layers.7"): tensors[name].clone()}
    save_file(more, adapter / WEIGHTS_NAME)
    assert_refused(ValueError, r"it has no place for .*layers\.7", check_adapter, adapter)
    save_file(tensors, adapter / WEIGHTS_NAME)
    other = tiny_checkpoint(tmp_path / "gpt2", "gpt2")
    deeper = tiny_checkpoint(tmp_path / "deeper", num_hidden_layers=3)
    for folder, message in ((other, "does not fit"), (deeper, r"the adapter lacks .*layers\.2")):
        edit_json(adapter / CONFIG_NAME, base_model_name_or_path=str(folder))
        assert_refused(ValueError, message, load_model, adapter)


def test_damaged_adapters_are_refused(base, adapter, tmp_path):
    with (adapter / WEIGHTS_NAME).open("r+b") as file:
        file.truncate(100)
    assert_refused(ValueError, "not a whole safetensors file", check_adapter, adapter)
    (adapter / WEIGHTS_NAME).rename(adapter / "adapter_model.bin")
    for name, message in (
        (str(base), "from safetensors only, never from pickles"),
        (None, "names no base_model_name_or_path"),
        (str(tmp_path / "gone"), r"is for '.*gone', which is not there"),
        (str(adapter), "is an adapter itself"),
    ):
        edit_json(adapter / CONFIG_NAME, base_model_name_or_path=name)
        assert_refused((ValueError, FileNotFoundError), message, load_model, adapter)
    (adapter / CONFIG_NAME).write_text("{")
    assert_refused(ValueError, "not valid JSON", load_model, adapter)


def test_without_peft_the_extra_is_named(adapter, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_refused(ModuleNotFoundError, r"pip install '\.\[adapters\]'", load_model, adapter)
