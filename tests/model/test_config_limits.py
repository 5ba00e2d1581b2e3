"""Configurations of models and adapters that ask for more than is stored, and ones that do not."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers.models.auto import modeling_auto

from prunus.model import meta_model
from prunus.model.checkpoint.tensor_files import Checkpoint
from prunus.model.config import StoredSizes, check_processor_files
from prunus.model.kinds import CAUSAL
from prunus.model.loading import load_model
from prunus.model.meta_model import build_on_meta, limited_modules
from prunus.model.open_folder import OpenFolder
from prunus.model.tokenizer import load_tokenizer
from refusals import assert_refused
from tiny import tiny_checkpoint


@pytest.fixture
def folder(tmp_path):
    return tiny_checkpoint(tmp_path / "dense")


def write(folder, content):
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({"model_type": "qwen3", "num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"model_type": "qwen3", "num_hidden_layers": 1e9}, "num_hidden_layers"),
        ({"model_type": "gptj", "n_positions": 4 * 10**8}, "n_positions"),
        ({"model_type": "bert", "max_position_embeddings": 4 * 10**8}, "max_position_embeddings"),
        ({"model_type": "gpt_neo", "attention_types": [[["global"], 10**9]]}, "attention_types"),
        ({"model_type": "qwen3_moe", "num_experts": 10**9}, "num_experts"),
        ({"model_type": "llama", "num_labels": 10**9}, "num_labels"),
        ({"model_type": "vit", "image_size": [10**6, 10**6]}, "image_size"),
        (
            {"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**9}},
            "num_hidden_layers",
        ),
        ({"model_type": "llama", "a": {"b": [{"unheard_of": 10**9}]}}, "unheard_of"),
    ],
)
def test_a_number_beyond_the_weights_is_refused_before_transformers_sees_it(
    content, field, folder, monkeypatch
):
    monkeypatch.setattr(
        transformers.AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("too late")
    )
    write(folder, content)
    for work in (lambda opened: opened.config, load_tokenizer, load_model):
        assert_refused(ValueError, f"asks for {field} = ", work, OpenFolder(folder))


def test_tensors_that_hold_nothing_allow_no_layers(tmp_path):
    names = [f"model.layers.{number}.x.weight" for number in range(1000)]
    save_file({name: torch.empty(0, 8) for name in names}, tmp_path / "model.safetensors")
    write(tmp_path, {"model_type": "qwen3", "num_hidden_layers": 1000})
    assert_refused(
        ValueError, r"0 bytes in 0 tensors of 0 layers", OpenFolder(tmp_path).check_config
    )
    save_file({name: torch.ones(1, 8) for name in names}, tmp_path / "model.safetensors")
    OpenFolder(tmp_path).check_config()


def test_layers_and_experts_are_counted_by_their_numbers(tmp_path):
    tensors = {
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": torch.ones(3, 2)
        for layer in range(2)
        for expert in (0, 5)
    }
    save_file(tensors | {"head": torch.ones(7)}, tmp_path / "model.safetensors")
    assert StoredSizes.of(Checkpoint(tmp_path)) == StoredSizes(
        numbers=4 * (4 * 6 + 7), tensors=5, layers=2, experts=2, longest=7
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "is no JSON object"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", "deeper than 32"),
        ("[" * 100_000, "not valid JSON"),
        ('{"layers": ' + "9" * 5000 + "}", "not valid JSON"),
        (json.dumps({"layer_types": ["x"] * 20_000}), "list of 20,000 entries"),
        (json.dumps({"x": "y" * 2**24}), "a file of this kind may have 16,777,216"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(text, message, folder):
    (folder / "config.json").write_text(text)
    assert_refused(ValueError, message, getattr, OpenFolder(folder), "config")


def test_the_files_of_a_tokenizer_are_limited_too(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({"model_max_length": 10**30}))
    check_processor_files(folder)
    path.write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 10**9}))
    assert_refused(ValueError, "extra_ids = 1,000,000,000", load_tokenizer, OpenFolder(folder))


SOME_TYPES = ("llama", "gpt2", "gemma3", "mamba2", "deepseek_v3", "falcon_h1", "longcat_flash")
ALL_TYPES = tuple(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize(
    "model_types",
    [SOME_TYPES, pytest.param(ALL_TYPES, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_the_defaults_of_known_models_are_accepted(model_types, tmp_path):
    """With experts and a vocabulary in the checkpoint, as they would be."""
    save_file(
        {"experts": torch.ones(16384, 1, 1), "embedding": torch.ones(2500, 2000)},
        tmp_path / "model.safetensors",
    )
    checked = 0
    for model_type in model_types:
        try:
            config = transformers.AutoConfig.for_model(model_type)
        except Exception:
            continue
        (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
        OpenFolder(tmp_path).check_config()
        checked += 1
    assert checked > 0.9 * len(model_types)


def test_tables_that_fill_memory_are_not_computed_and_modules_without_end_are_not_made(
    folder, monkeypatch
):
    small = {"n_embd": 64, "n_head": 1, "n_layer": 1, "vocab_size": 64, "n_positions": 2**24}
    for content in ({"model_type": "gptj", "rotary_dim": 64}, {"model_type": "gpt_bigcode"}):
        write(folder, small | content)
        with pytest.raises(ValueError, match="it asks for more than"):
            build_on_meta(CAUSAL, OpenFolder(folder).config, torch.float32, False)
    monkeypatch.setattr(meta_model, "_MAX_MODULES", 10)
    with pytest.raises(ValueError, match="more than 10 modules"), limited_modules():
        torch.nn.ModuleList(torch.nn.Identity() for _ in range(10**9))
    torch.nn.ModuleList(torch.nn.Identity() for _ in range(20))
