"""A bit of a written shard changes: resuming and `inspect --verify` notice it."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import prunus
from command_line import call
from prunus.model.checkpoint.atomic_files import recorded_digests, verify_shards
from prunus.model.checkpoint.reader import INDEX_NAME
from recovery_cases import dense_checkpoint, pruned_checkpoint, recover, training_text
from stopping import StopError, stop_after
from tiny import token_ids

CHANGED = "is not what was written: its SHA-256 is not the recorded one"


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A folder with results of every verb; no test writes to it."""
    folder = tmp_path_factory.mktemp("rot")
    dense = dense_checkpoint(folder / "dense", dtype=torch.bfloat16)
    pruned = pruned_checkpoint(folder / "pruned", dense)
    pruned_checkpoint(folder / "pruned-head", dense, head=True)
    prunus.compress(dense, folder / "compressed", 4, calibration=token_ids())
    text = training_text(folder)
    recover(pruned, folder / "recovered", "masked", text, tokens=64, evaluations=1)
    return folder


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def prune(material: Path, out: Path, **options: Any) -> Any:
    return prunus.prune(
        material / "dense", out, calibration=token_ids(), dtype="float32", **options
    )


@pytest.mark.parametrize("name", ["pruned", "pruned-head", "compressed", "recovered"])
def test_every_record_holds_the_digest_of_every_shard(name, material):
    folder = material / name
    shards = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("*.safetensors")
    }
    assert recorded_digests(folder) == shards
    assert set(json.loads((folder / INDEX_NAME).read_text())["weight_map"].values()) == set(shards)
    assert verify_shards(folder) == len(shards)


@pytest.mark.parametrize("number", [1, 3])
def test_resume_refuses_a_changed_shard_and_makes_a_removed_one_again(number, material, tmp_path):
    out, shard = tmp_path / "out", f"model-0000{number}-of-00003.safetensors"
    with pytest.raises(StopError):
        prune(material, out, progress=stop_after(1))
    flip(out / shard)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=rf"{shard} {CHANGED}.* remove it"):
        prune(material, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / shard).unlink()
    assert prune(material, out).state == "finished"
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == (material / "pruned" / path.name).read_bytes()
    assert verify_shards(out) == 3


def test_inspect_verifies_on_request(material, tmp_path):
    shutil.copytree(material / "pruned", tmp_path / "model")
    shown = call("inspect", tmp_path / "model", "--verify").output
    assert "shards that have the bytes that were written: 3" in shown
    flip(tmp_path / "model" / "model-00002-of-00003.safetensors")
    assert "bytes that were written" not in call("inspect", tmp_path / "model").output
    refused = call("inspect", tmp_path / "model", "--verify", status=2).output
    assert "model-00002-of-00003.safetensors differ from the SHA-256" in " ".join(refused.split())
    assert prunus.inspect(material / "compressed", verify=True).verified == 3


def test_what_cannot_be_verified_is_an_error(material, tmp_path):
    with pytest.raises(FileNotFoundError, match="prunus did not write it"):
        prunus.inspect(material / "dense", verify=True)
    shutil.copytree(material / "pruned", tmp_path / "model")
    last = "model-00003-of-00003.safetensors"
    (tmp_path / "model" / last).unlink()
    with pytest.raises(FileNotFoundError, match=rf"has lost {last}"):
        verify_shards(tmp_path / "model")
    shutil.copy(material / "pruned" / last, tmp_path / "model")
    shutil.copy(material / "pruned" / last, tmp_path / "model" / "more.safetensors")
    with pytest.raises(ValueError, match=r"more\.safetensors differ"):
        verify_shards(tmp_path / "model")


@pytest.mark.parametrize("damage", [{"sha256": []}, {"sha256": {"a": 1}}, []])
def test_a_damaged_record_is_an_error(damage, tmp_path):
    (tmp_path / "prunus.json").write_text(json.dumps(damage))
    with pytest.raises(ValueError, match=r"prunus\.json is damaged"):
        recorded_digests(tmp_path)
