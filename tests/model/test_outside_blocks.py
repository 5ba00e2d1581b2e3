"""Models without weights, and their parts outside the blocks: tables, an embedding, a head."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from prunus.model.kinds import kind_of
from prunus.model.meta_model import build_on_meta
from prunus.model.open_folder import OpenFolder
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
    source = CheckpointSource(OpenFolder(folder))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "family", ["bloom", "gptj", "gpt_neo", "gemma3_text", "deepseek_v3", "jamba", "gpt_oss"]
)
def test_tables_are_those_of_a_loaded_model(family, dtype, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(tmp_path, family), dtype=dtype)
    found = build_on_meta(kind_of(model.config), model.config, dtype, False)
    assert {parameter.device.type for parameter in found.parameters()} == {"meta"}
    tables = dict(found.named_buffers())
    assert tables.keys() == dict(model.named_buffers()).keys()
    for name, expected in model.named_buffers():
        if name not in model.state_dict():
            assert expected.dtype == tables[name].dtype, name
            assert torch.equal(tables[name], expected), name
