"""Outside the blocks: an embedding of which only some rows are read, and a head that needs all."""

import pytest
import torch

from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from tiny import tiny_checkpoint, token_ids

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return tiny_checkpoint(
        tmp_path_factory.mktemp("tied") / "dense", "llama", torch.bfloat16, tie_word_embeddings=True
    )


def opened(folder, dtype):
    source = CheckpointSource(folder)
    skeleton = Skeleton(source.config, dtype)
    source.bind(skeleton)
    return source, skeleton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_read_as_stored_and_given_in_the_dtype_of_the_computation(tied, dtype):
    source, skeleton = opened(tied, dtype)
    embedding = skeleton.model.get_input_embeddings()
    [weight_VI] = source.read_outside(["model.embed_tokens.weight"]).values()
    ids = token_ids(2)
    with skeleton.outside_blocks(source.read_outside, CPU):
        assert embedding.weight.dtype == torch.bfloat16
        hidden, _ = skeleton.record(ids)
    assert hidden.dtype == dtype
    assert torch.equal(hidden, weight_VI[ids].to(dtype))
    assert embedding.weight.device.type == "meta"
    assert embedding.weight.dtype == dtype
    assert "forward" not in vars(embedding)


def test_a_tied_head_gets_all_of_it_whatever_was_read_before(tied):
    source, skeleton = opened(tied, torch.float32)
    model = skeleton.model
    with skeleton.outside_blocks(source.read_outside, CPU):
        pass
    with skeleton.outside_blocks(source.read_outside, CPU, with_head=True):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert model.get_output_embeddings().weight.dtype == torch.float32
