"""A run that is resumed on a checkpoint that was changed meanwhile is refused, by name."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunus
from stopping import StopError, stop_after
from tiny import shards, tiny_checkpoint, token_ids

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


def change(folder, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def stopped(master, tmp_path):
    """Stops a verb after some blocks, changes tensors, and checks that it is refused then."""

    def check(verb: str, blocks: int, names: list[str], message: str) -> None:
        dense, out = shutil.copytree(master, tmp_path / "dense"), tmp_path / "out"
        options = {"calibration": token_ids(2, 16), "batch": 1}
        with pytest.raises(StopError):
            VERBS[verb](dense, out, progress=stop_after(blocks), **options)
        for name in names:
            change(dense, name)
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
def test_another_tensor_outside_the_blocks_is_refused(verb, name, blocks, stopped):
    stopped(verb, min(blocks, LAST[verb]), [name], rf"another tensor {name}")


@pytest.mark.parametrize("verb", ["prune with an allocation", "compress", "shrink by a search"])
def test_another_block_than_the_one_that_was_measured_is_refused(verb, stopped):
    names = [f"model.layers.{index}.mlp.up_proj.weight" for index in (1, 2)]
    stopped(verb, 1, names, r"model\.layers\.[12] of .* is not what it was")


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("verb", VERBS)
def test_a_finished_block_that_was_made_from_other_weights_is_refused(verb, blocks, stopped):
    blocks = min(blocks, LAST[verb])
    names = [f"model.layers.{index}.mlp.up_proj.weight" for index in range(blocks - 1, 3)]
    stopped(verb, blocks, names, r"model\.layers\.\d of .* is not what it was")
