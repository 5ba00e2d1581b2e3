"""A head that the configuration calls the embedding, and that is stored with other numbers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

import prunus
from changes import edit_tensors
from gguf_cases import compress, gguf_checkpoint
from prunus.formats.gguf.import_checkpoint import import_gguf
from prunus.formats.mlx import MlxCodec
from prunus.model.open_folder import OpenFolder
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource, ModuleSource
from tiny import stored, token_ids

CPU = torch.device("cpu")


def with_head(folder: Path, made: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A checkpoint that says it is tied, and stores a head that is made of the embedding."""
    gguf_checkpoint(folder, tie_word_embeddings=True, num_hidden_layers=1)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    edit_tensors(folder, lambda x: x.update({head: made(x[embedding]).contiguous()}))
    return folder


@pytest.fixture(scope="module")
def two_matrices(tmp_path_factory) -> Path:
    """A checkpoint that says it is tied, and stores a head of other numbers."""
    return with_head(tmp_path_factory.mktemp("two") / "dense", lambda weight: weight.flip(0))


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(token_ids(2)).logits


@pytest.mark.parametrize("form", ["gguf", "mlx", "compressed-tensors", "prune"])
def test_a_stored_head_that_is_not_the_embedding_is_kept_as_transformers_loads_it(
    form, two_matrices, tmp_path
):
    out = tmp_path / ("x.gguf" if form == "gguf" else "out")
    if form == "prune":
        prunus.prune(two_matrices, out, calibration=token_ids(), sparsity=0.0)
    elif form == "gguf":
        compress(two_matrices, out, type="Q8_0")
        import_gguf(out, tmp_path / "dense")
    else:
        compress(two_matrices, out, bits=8, format=form)
        if form == "mlx":
            MlxCodec.unpack(out, tmp_path / "dense")
    expected = logits(two_matrices)
    if form != "compressed-tensors":
        result = logits(out if form == "prune" else tmp_path / "dense")
        assert float((result - expected).norm() / expected.norm()) < 0.02
    if form != "prune":
        path = tmp_path / "dense" if form == "gguf" else out
        assert json.loads((path / "config.json").read_text())["tie_word_embeddings"] is False
    if form == "compressed-tensors":
        head = stored(out)["lm_head.weight"]
        assert torch.equal(head, stored(two_matrices)["lm_head.weight"])


def test_a_model_is_computed_with_the_head_that_it_stores(two_matrices):
    weights = load_file(two_matrices / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(two_matrices, dtype=torch.float32)
    for source in (CheckpointSource(OpenFolder(two_matrices)), ModuleSource(loaded)):
        skeleton = Skeleton(source.config, torch.float32)
        source.bind(skeleton)
        with skeleton.outside_blocks(source.read_outside, CPU):
            hidden, _ = skeleton.record(token_ids(2))
        assert torch.equal(hidden, weights["model.embed_tokens.weight"].float()[token_ids(2)])
        with skeleton.outside_blocks(source.read_outside, CPU, with_head=True):
            assert torch.equal(
                skeleton.vocabulary_weights.linear_head.weight_OI, weights["lm_head.weight"].float()
            )


def test_a_head_that_is_stored_twice_with_equal_numbers_stays_the_embedding(two_matrices, tmp_path):
    folder = with_head(tmp_path / "dense", torch.clone)
    record = compress(folder, tmp_path / "x.gguf", type="Q8_0")
    assert "lm_head" not in record.types and "model.embed_tokens" in record.types
    assert {"lm_head", "model.embed_tokens"} <= compress(
        two_matrices, tmp_path / "y.gguf", type="Q8_0"
    ).types.keys()
