"""A packed folder of an earlier version ends every command with one sentence, and is left alone."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import prunus
from changes import edit_json
from command_line import call
from tiny import tree
from tiny_tokenizer import dense_checkpoint

#: The end of the sentence that every command says.
SAID = (
    r"prunus before 0\.4 made it, and this version does not read it\. `prunus unpack` of version "
    r"0\.3"
)
WINDOWS = "--calibration text.txt --samples 2 --seqlen 16"
TRAINING = "--text text.txt --seqlen 16 --tokens 1024"
COMMANDS = [
    f"prune packed out {WINDOWS}",
    f"compress packed out --bits 4 {WINDOWS}",
    f"compress packed out.gguf --bits 4 {WINDOWS}",
    f"shrink packed out --blocks 1 {WINDOWS}",
    f"recover packed out --mode masked {TRAINING}",
    f"recover dense out --mode full --teacher packed {TRAINING}",
    f"plan packed {WINDOWS}",
    "eval packed --perplexity text.txt --seqlen 16",
    "eval dense --perplexity text.txt --seqlen 16 --reference packed",
    "eval adapter --perplexity text.txt --seqlen 16",
    "inspect packed",
    "generate packed --prompt a",
    "generate adapter --prompt a",
    "import packed out",
    "sweep sweep.toml out",
    "report packed",
    # As the output of a command it is a result with other options.
    f"compress dense packed --bits 4 {WINDOWS}",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A dense model, a packed one with its record, and an adapter for that; no test writes here."""
    place = tmp_path_factory.mktemp("place")
    dense = dense_checkpoint(place / "dense", dtype=torch.bfloat16)
    packed = shutil.copytree(dense, place / "packed")
    described = {"quant_method": "prunus", "format_version": 3, "linears": {}}
    edit_json(packed / "config.json", quantization_config=described)
    (packed / "prunus-compress.json").write_text(json.dumps(record_of_a_packed_model()))
    (place / "adapter").mkdir()
    adapter = {"base_model_name_or_path": "../packed", "peft_type": "LORA"}
    (place / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    shutil.copy(dense / "tokenizer.json", place / "adapter")
    shutil.copy(dense / "tokenizer_config.json", place / "adapter")
    (place / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 12)
    (place / "sweep.toml").write_text(
        'models = ["packed"]\n[scoring]\ntexts = ["text.txt"]\nseqlen = 16\n'
        '[[grid]]\nmethod = "magnitude"\nsparsity = [0.5]\n'
    )
    return place


def record_of_a_packed_model() -> dict:
    """What version 0.3 wrote, with one linear."""
    linear = {"shape": [32, 32], "zeros": 5, "sparsity": 0.005, "tokens": 32, "seconds": 0.1}
    linear |= {"bits": 4.0, "log2_step": 1.5, "packed": {"shape": [32, 32]}}
    block = {"name": "model.layers.0", "input_sha256": "ab", "walk": "lockstep"}
    inputs = {"checkpoint": "ab", "dtype": "float32", "dtype_reason": "it is", "device": "cpu"}
    inputs |= {"calibration": "text.txt", "calibration_sha256": "ab", "batch": 2, "bos": "no"}
    recipe = {"bits": 4.0, "head_bits": 6, "sparsity": 0.0, "pattern": "unstructured"}
    return {
        "format": 2,
        "state": "finished",
        "source": "dense",
        "recipe": recipe | {"dense_weight": 0.25, "only": [], "ignore": []},
        "inputs": inputs,
        "versions": {"prunus": "0.3.0"},
        "blocks": [block | {"linears": {"mlp.up_proj": linear}}],
        "packed_outside": {"model.embed_tokens": {"shape": [128, 32]}},
    }


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_says_that_it_is_old_and_which_version_turns_it_back(
    line, place, monkeypatch
):
    if "adapter" in line:
        pytest.importorskip("peft")
    monkeypatch.chdir(place)
    before = tree(place)
    said = call(*line.split(), status=2).stderr.splitlines()
    assert re.search(SAID, said[-1]), said[-1]
    assert sum("error" in each for each in said) == 1
    assert tree(place) == before


def test_so_does_the_library(place):
    with pytest.raises(ValueError, match=SAID):
        prunus.load(place / "packed")


def test_an_output_that_is_one_is_replaced_if_that_is_asked_for(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    out = shutil.copytree(place / "packed", tmp_path / "out")
    call("compress", "dense", out, "--bits", 4, "--overwrite", *WINDOWS.split())
    assert prunus.inspect(out).bits > 4
