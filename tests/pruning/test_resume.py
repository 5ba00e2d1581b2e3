"""After a kill the same command ends in the same bytes. Another command changes nothing."""

import fnmatch
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunus
from prunus.model.checkpoint.reader import INDEX_NAME
from scripts import run_script
from stopping import StopError, stop_after
from tiny import shards, tiny_checkpoint, token_ids

BLOCKS = "model-0000[12]-of-00003.safetensors"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_run_killed_at_any_rename_resumes_to_the_same_bytes(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "llama", torch.bfloat16)
    results = run_script("kill_points.py", dense, tmp_path)
    assert len(results) >= 14, "two blocks, manifests, outer shard and index, before and after"
    assert {len(fnmatch.filter(r["found"], BLOCKS)) for r in results} == {0, 1, 2}
    for result in results:
        assert result["status"] == 0, result
        assert result["equal"], result
        assert not result["left_behind"], result
    unfinished = [r for r in results if INDEX_NAME not in r["found"]]
    assert len(unfinished) >= 10, "there is no index until the end: half is no model"


def test_an_interrupted_run_is_resumed_not_redone(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=3)
    ids, out = token_ids(), tmp_path / "out"
    with pytest.raises(StopError):
        prunus.prune(dense, out, calibration=ids, progress=stop_after(2))
    assert not (out / INDEX_NAME).exists()
    first = (out / "model-00001-of-00004.safetensors").stat().st_mtime_ns
    messages = []
    report = prunus.prune(
        dense, out, calibration=ids, resume=True, progress=lambda s: messages.append(s.message)
    )
    assert ["earlier run" in m for m in messages] == [True, True, False]
    assert (out / "model-00001-of-00004.safetensors").stat().st_mtime_ns == first
    assert report.state == "finished"
    assert [block.name for block in report.blocks] == [f"model.layers.{i}" for i in range(3)]


def test_a_run_with_unrounded_weights_resumes_to_the_same_bytes(tmp_path):
    """Shards are rounded to bfloat16. In the reference order the next block sees exact weights."""
    dense = tiny_checkpoint(tmp_path / "dense", "llama", torch.bfloat16, num_hidden_layers=3)
    options = {"calibration": token_ids(), "method": "sparsegpt", "propagate": "block"}
    prunus.prune(dense, tmp_path / "whole", **options)
    with pytest.raises(StopError):
        prunus.prune(dense, tmp_path / "out", **options, progress=stop_after(2))
    prunus.prune(dense, tmp_path / "out", **options)
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sparsity": 0.25}, "sparsity"),
        ({"calibration": token_ids() + 1}, "calibration_sha256"),
        ({"batch": 3}, "batch"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused(change, named, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense")
    options = {"calibration": token_ids(), "sparsity": 0.5, "batch": 2}
    with pytest.raises(StopError):
        prunus.prune(dense, tmp_path / "out", **options, progress=stop_after(1))
    before = contents(tmp_path / "out")
    with pytest.raises(FileExistsError, match=f"another {named}"):
        prunus.prune(dense, tmp_path / "out", **(options | change))
    assert contents(tmp_path / "out") == before
    report = prunus.prune(dense, tmp_path / "out", **(options | change), overwrite=True)
    assert report.state == "finished"


def test_another_model_in_the_same_folder_is_refused(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense")
    other = tiny_checkpoint(tmp_path / "other", num_hidden_layers=3)
    prunus.prune(dense, tmp_path / "out", calibration=token_ids())
    with pytest.raises(FileExistsError, match="another checkpoint"):
        prunus.prune(other, tmp_path / "out", calibration=token_ids())


def test_resume_flags(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense")
    with pytest.raises(FileNotFoundError, match="no unfinished run"):
        prunus.prune(dense, tmp_path / "out", calibration=token_ids(), resume=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(StopError):
        prunus.prune(dense, tmp_path / "out", calibration=token_ids(), progress=stop_after(1))
    with pytest.raises(FileExistsError, match="unfinished run"):
        prunus.prune(dense, tmp_path / "out", calibration=token_ids(), resume=False)


def test_a_shard_lost_from_an_unfinished_run_is_made_again(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=3)
    prunus.prune(dense, tmp_path / "whole", calibration=token_ids())
    with pytest.raises(StopError):
        prunus.prune(dense, tmp_path / "out", calibration=token_ids(), progress=stop_after(2))
    (tmp_path / "out" / "model-00002-of-00004.safetensors").unlink()
    prunus.prune(dense, tmp_path / "out", calibration=token_ids())
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def as_of_version_0_3(folder: Path, record: str) -> None:
    """Rename the shards of a result, and change its record, to what earlier versions wrote."""
    path, index = folder / record, folder / INDEX_NAME
    found = sorted(folder.glob("model-*.safetensors"))
    names = {each.name: f"block-{number:05d}.safetensors" for number, each in enumerate(found)}
    names[found[-1].name] = "outer.safetensors"
    for each in found:
        each.rename(folder / names[each.name])
    content = json.loads(path.read_text())
    content.pop("shard_count", None)
    content |= {"format": 1, "sha256": {names[x]: y for x, y in content["sha256"].items()}}
    if record == "prunus.json":
        content["recipe"] |= {"refine": "none", "refine_steps": None}
    if record == "prunus-structure.json":
        content["recipe"] |= {"block_rule": "divergence"}
        content["search"] = [step | {"measure": "divergence"} for step in content["search"]]
    if "shards" in content:
        content["shards"] = {names[x]: y for x, y in content["shards"].items()}
    path.write_text(json.dumps(content))
    if index.exists():
        known = json.loads(index.read_text())
        known["weight_map"] = {x: names[y] for x, y in known["weight_map"].items()}
        index.write_text(json.dumps(known))


def test_a_result_has_the_names_of_shards_that_the_hub_knows(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "llama", torch.bfloat16)
    prunus.prune(dense, tmp_path / "out", calibration=token_ids())
    prunus.shrink(dense, tmp_path / "small", blocks=1, repair=False, calibration=token_ids())
    for name, count in (("out", 3), ("small", 2)):
        known = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        assert [*shards(tmp_path / name)] == known
        content = json.loads((tmp_path / name / INDEX_NAME).read_text())
        assert sorted(set(content["weight_map"].values())) == known
        AutoModelForCausalLM.from_pretrained(tmp_path / name)


def test_a_result_of_an_earlier_version_is_read_and_its_unfinished_run_refused(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "llama", torch.bfloat16)
    out = tmp_path / "out"
    prunus.prune(dense, out, calibration=token_ids())
    as_of_version_0_3(out, "prunus.json")
    assert prunus.inspect(out, verify=True).verified == 3
    assert prunus.prune(dense, out, calibration=token_ids()).state == "finished"
    AutoModelForCausalLM.from_pretrained(out)
    path = out / "prunus.json"
    path.write_text(path.read_text().replace('"finished"', '"running"'))
    before = contents(out)
    with pytest.raises(FileExistsError, match="unfinished run of an earlier version"):
        prunus.prune(dense, out, calibration=token_ids())
    assert contents(out) == before
    prunus.prune(dense, out, calibration=token_ids(), overwrite=True)
    assert [*shards(out)] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


def test_a_record_with_the_former_dense_weight_auto_is_read(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "llama", torch.bfloat16)
    prunus.prune(dense, tmp_path / "out", method="magnitude")
    content = json.loads((tmp_path / "out" / "prunus.json").read_text())
    content["recipe"]["dense_weight"] = "auto"
    (tmp_path / "out" / "prunus.json").write_text(json.dumps(content))
    assert prunus.Manifest.load(tmp_path / "out").recipe.dense_weight == 0.25
