"""A run that is resumed on a checkpoint that was changed meanwhile is refused, by name."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunus
from stopping import StopError, stop_after
from tiny import tiny_checkpoint, token_ids

WIDER = {"hidden_size": 64, "intermediate_size": 128}
VERBS = {
    "prune": lambda *a, **o: prunus.prune(*a, method="wanda", **o),
    "prune with a search": lambda *a, **o: prunus.prune(*a, allocation="search", **o),
    "compress": lambda *a, **o: prunus.compress(*a, 4, **o),
    "shrink": lambda *a, **o: prunus.shrink(*a, width=0.25, repair=False, **o),
    "shrink by a search": lambda *a, **o: prunus.shrink(*a, blocks=2, repair=False, **o),
}


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    folder = tmp_path_factory.mktemp("changed") / "dense"
    return tiny_checkpoint(folder, "llama", torch.bfloat16, num_hidden_layers=3, **WIDER)


def change(folder, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
)
def test_another_tensor_outside_the_blocks_is_refused(verb, name, master, tmp_path):
    dense, out = shutil.copytree(master, tmp_path / "dense"), tmp_path / "out"
    options = {"calibration": token_ids(8, 16), "batch": 1}
    with pytest.raises(StopError):
        VERBS[verb](dense, out, progress=stop_after(1), **options)
    change(dense, name)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(FileExistsError, match=rf"another tensor {name}"):
        VERBS[verb](dense, out, **options)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.parametrize("verb", ["prune with a search", "compress", "shrink by a search"])
def test_another_block_than_the_one_that_was_measured_is_refused(verb, master, tmp_path):
    dense, out = shutil.copytree(master, tmp_path / "dense"), tmp_path / "out"
    options = {"calibration": token_ids(8, 16), "batch": 1}
    with pytest.raises(StopError):
        VERBS[verb](dense, out, progress=stop_after(1), **options)
    change(dense, "model.layers.2.mlp.up_proj.weight")
    change(dense, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(FileExistsError, match=r"model\.layers\.[12] of .* is not what it was"):
        VERBS[verb](dense, out, **options)


def test_a_finished_block_that_was_made_from_other_weights_is_refused(master, tmp_path):
    dense, out = shutil.copytree(master, tmp_path / "dense"), tmp_path / "out"
    options = {"calibration": token_ids(8, 16), "batch": 1}
    with pytest.raises(StopError):
        prunus.prune(dense, out, progress=stop_after(1), **options)
    change(dense, "model.layers.0.mlp.up_proj.weight")
    with pytest.raises(FileExistsError, match=r"model\.layers\.0 of .* was made from"):
        prunus.prune(dense, out, **options)
