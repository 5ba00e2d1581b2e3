"""After a kill the same command ends in the same bytes. Another command changes nothing.

Nor does the same command on a checkpoint that was changed meanwhile, which is named.
"""

import fnmatch
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunus
from changes import edit_json, edit_tensors
from prunus.model.checkpoint.tensor_files import INDEX_NAME
from refusals import assert_refused
from scripts import run_script
from stopping import assert_all_resumed, assert_resumes, interrupt, stop_after
from tiny import shards, tiny_checkpoint, token_ids

BLOCKS = "model-0000[12]-of-00003.safetensors"


@pytest.fixture
def dense(tmp_path) -> Path:
    return tiny_checkpoint(tmp_path / "dense", "llama", torch.bfloat16)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_run_killed_at_any_rename_resumes_to_the_same_bytes(dense, tmp_path):
    results = run_script("kill_points.py", dense, tmp_path)
    assert len(results) >= 14, "two blocks, manifests, outer shard and index, before and after"
    assert {len(fnmatch.filter(r["found"], BLOCKS)) for r in results} == {0, 1, 2}
    assert_all_resumed(results)
    unfinished = [r for r in results if INDEX_NAME not in r["found"]]
    assert len(unfinished) >= 10, "there is no index until the end: half is no model"


def test_an_interrupted_run_is_resumed_not_redone(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=3)
    ids, out = token_ids(), tmp_path / "out"
    interrupt(prunus.prune, dense, out, after=2, calibration=ids)
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
    run = partial(prunus.prune, dense, **options)
    assert_resumes(run, tmp_path, stop_after(2))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sparsity": 0.25}, "sparsity"),
        ({"calibration": token_ids() + 1}, "calibration_sha256"),
        ({"batch": 3}, "batch"),
        ({"bos": "no"}, "bos"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused(dense, change, named, tmp_path):
    options = {"calibration": token_ids(), "sparsity": 0.5, "batch": 2}
    interrupt(prunus.prune, dense, tmp_path / "out", **options)
    before = contents(tmp_path / "out")
    with pytest.raises(FileExistsError, match=f"another {named}"):
        prunus.prune(dense, tmp_path / "out", **(options | change))
    assert contents(tmp_path / "out") == before
    report = prunus.prune(dense, tmp_path / "out", **(options | change), overwrite=True)
    assert report.state == "finished"


def test_another_model_in_the_same_folder_is_refused(dense, tmp_path):
    other = tiny_checkpoint(tmp_path / "other", num_hidden_layers=3)
    prunus.prune(dense, tmp_path / "out", calibration=token_ids())
    with pytest.raises(FileExistsError, match="another checkpoint"):
        prunus.prune(other, tmp_path / "out", calibration=token_ids())


def test_an_unfinished_run_is_not_begun_again_where_nothing_may_be_resumed(dense, tmp_path):
    interrupt(prunus.prune, dense, tmp_path / "out", calibration=token_ids())
    with pytest.raises(FileExistsError, match="unfinished run"):
        prunus.prune(dense, tmp_path / "out", calibration=token_ids(), resume=False)


def test_a_result_has_the_names_of_shards_that_the_hub_knows(dense, tmp_path):
    prunus.prune(dense, tmp_path / "out", calibration=token_ids())
    prunus.shrink(dense, tmp_path / "small", blocks=1, repair=False, calibration=token_ids())
    for name, count in (("out", 3), ("small", 2)):
        known = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        assert [*shards(tmp_path / name)] == known
        content = json.loads((tmp_path / name / INDEX_NAME).read_text())
        assert sorted(set(content["weight_map"].values())) == known
        AutoModelForCausalLM.from_pretrained(tmp_path / name)


def test_overwriting_removes_no_weights_of_somebody_else(dense, tmp_path):
    out, options = tmp_path / "out", {"method": "magnitude", "overwrite": True}
    prunus.prune(dense, out, **options)
    (out / "notes.txt").write_text("stays")
    prunus.prune(dense, out, **options)
    (out / "mine.safetensors").write_bytes(b"")
    message = r"files that prunus prune did not write \(mine\.safetensors\)"
    assert_refused(FileExistsError, message, prunus.prune, dense, out, **options)
    assert (out / "notes.txt").exists()


def test_the_record_of_a_version_before_0_4_is_refused_in_one_sentence(dense, tmp_path):
    prunus.prune(dense, tmp_path / "out", method="magnitude")
    edit_json(tmp_path / "out" / "prunus.json", versions={"prunus": "0.3.0"})
    for read in (prunus.Manifest.load, prunus.report):
        assert_refused(ValueError, "record of prunus 0.3.0, and those", read, tmp_path / "out")


# --- a checkpoint that was changed meanwhile ---

WIDER = {"hidden_size": 64, "intermediate_size": 128}
VERBS = {
    "prune": lambda *a, **o: prunus.prune(*a, method="wanda", **o),
    "prune with an allocation": lambda *a, **o: prunus.prune(*a, allocation="fisher", **o),
    "compress": lambda *a, **o: prunus.compress(*a, 4.5, format="mlx", **o),
    "shrink by a search": lambda *a, **o: prunus.shrink(*a, blocks=2, repair=False, **o),
}
#: The number of blocks in the result.
LAST = dict.fromkeys(VERBS, 3) | {"shrink by a search": 1}


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    folder = tmp_path_factory.mktemp("changed") / "dense"
    return tiny_checkpoint(folder, "llama", torch.bfloat16, num_hidden_layers=3, **WIDER)


@pytest.fixture
def refused_after(master, tmp_path):
    """Stops a verb after some blocks or lets it end, and checks that other tensors are refused."""

    def check(verb: str, blocks: int, names: list[str], message: str) -> None:
        dense, out = shutil.copytree(master, tmp_path / "dense"), tmp_path / "out"
        options = {"calibration": token_ids(2, 16), "batch": 1}
        if blocks > LAST[verb]:
            VERBS[verb](dense, out, **options)
        else:
            interrupt(VERBS[verb], dense, out, after=blocks, **options)
        for name in names:
            edit_tensors(dense, lambda tensors: tensors[name].mul_(1.5))  # noqa: B023
        before = shards(out)
        with pytest.raises(FileExistsError, match=message):
            VERBS[verb](dense, out, **options)
        assert shards(out) == before

    return check


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("name", "blocks"),
    [("model.embed_tokens.weight", 1), ("model.norm.weight", 2), ("lm_head.weight", 1)],
)
def test_another_tensor_outside_the_blocks_is_refused(verb, name, blocks, refused_after):
    refused_after(verb, min(blocks, LAST[verb]), [name], rf"another tensor {name}")


@pytest.mark.parametrize("verb", ["prune with an allocation", "compress", "shrink by a search"])
def test_another_block_than_the_one_that_was_measured_is_refused(verb, refused_after):
    names = [f"model.layers.{index}.mlp.up_proj.weight" for index in (1, 2)]
    refused_after(verb, 1, names, r"model\.layers\.[12] of .* is not what it was")


@pytest.mark.parametrize("blocks", [1, 99])
@pytest.mark.parametrize("verb", VERBS)
def test_a_finished_block_that_was_made_from_other_weights_is_refused(verb, blocks, refused_after):
    last = min(blocks, LAST[verb])
    blocks = last if blocks < 99 else blocks
    names = [f"model.layers.{index}.mlp.up_proj.weight" for index in range(last - 1, 3)]
    refused_after(verb, blocks, names, r"model\.layers\.\d of .* is not what it was")
