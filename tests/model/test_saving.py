"""Cards and records of models that are saved again."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import prunus
from prunus.model.checkpoint.card import base_model
from tiny import token_ids
from tiny_tokenizer import dense_checkpoint

LICENSED = """---
license: other
license_name: mine
language:
- en
- de
widget: []
---

# Dense
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A dense model with a license, as a hub's cache holds it; pruned and compressed."""
    place = tmp_path_factory.mktemp("records")
    dense = place / "models--owner--dense" / "snapshots" / "0"
    dense_checkpoint(dense, dtype=torch.bfloat16, hidden_size=64)
    (dense / "README.md").write_text(LICENSED)
    made = {name: place / name for name in ("pruned", "small")}
    ids = token_ids(2)
    prunus.prune(dense, made["pruned"], "magnitude", 0.5, calibration=ids)
    prunus.compress(dense, made["small"], 4, calibration=ids)
    return made | {"dense": dense}


def fields(folder: Path) -> dict:
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_the_card_of_a_pruned_model_has_what_the_hub_reads(folders):
    found = fields(folders["pruned"])
    expected = {
        "base_model": "owner/dense",
        "library_name": "transformers",
        "base_model_relation": "finetune",  # the hub has no word for pruned
        "tags": ["prunus", "pruned", "sparse", "sparsity-50"],
        "prunus": {
            **{"method": "magnitude", "sparsity": 0.5012, "sparsity_of_all_linears": 0.5012}
        },
        "license": "other",
        "license_name": "mine",
        "language": ["en", "de"],
    }
    assert found == found | expected and "widget" not in found


def test_the_card_of_a_compressed_model_has_what_the_hub_reads(folders):
    small = fields(folders["small"])
    assert small["library_name"] == "transformers" and small["base_model"] == "owner/dense"
    assert small["base_model_relation"] == "quantized" and "4-bit" in small["tags"]


def test_a_folder_is_no_base_for_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert base_model("owner/name") == "owner/name"
    (tmp_path / "owner/name").mkdir(parents=True)
    assert base_model("owner/name") is None
    assert base_model(str(tmp_path)) is None and base_model("../dense") is None


def test_a_model_that_is_saved_again_keeps_card_and_record(folders, tmp_path):
    model, tokenizer = prunus.load(folders["pruned"])
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/README.md").read_text() == (
        folders["pruned"] / "README.md"
    ).read_text()
    [path] = (tmp_path / "again").glob("prunus*.json")
    record = json.loads(path.read_text())
    # The bytes of the new shards are others than those that the record names.
    assert record["sha256"] == {} and record["state"] == "finished"
    assert prunus.report(tmp_path / "again").sections
    assert prunus.inspect(tmp_path / "again", verify=False).sparsity > 0.2
    assert prunus.load(tmp_path / "again").model.dtype == torch.bfloat16


def test_a_loaded_model_that_is_pruned_gets_them(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders["dense"])
    prunus.prune(model, method="magnitude", calibration=token_ids(2))
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        one.save_pretrained(tmp_path)
        assert fields(tmp_path)["base_model"] == "owner/dense"
        assert (tmp_path / "prunus.json").exists()
        (tmp_path / "README.md").unlink()


def test_other_models_stay_as_they_are(folders, tmp_path):
    model, _ = prunus.load(folders["dense"])
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists() and "save_pretrained" not in vars(model)
