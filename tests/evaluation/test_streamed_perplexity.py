"""Perplexity block by block: equal to the whole model's to the bit, and no weight read twice."""

import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunus
from command_line import call
from prunus.evaluation import streamed_model as streamed
from prunus.evaluation.model_input import ComputeOptions
from prunus.model.checkpoint.reader import Checkpoint
from tiny import tiny_checkpoint, token_ids


@pytest.fixture
def ids(tmp_path):
    save_file({"input_ids": token_ids(7, 24)}, tmp_path / "ids.safetensors")
    return str(tmp_path / "ids.safetensors")


def score(folder, ids, **options):
    return prunus.perplexity(folder, ids, seqlen=24, device="cpu", **options)


#: Embeddings and heads of every form: scaled, capped, with biases, projections, positions, norms.
FAMILIES = """
bloom codegen cohere falcon_h1 gemma2 gemma4_text gpt2 gpt_neox granite llama mamba mpt opt phi
qwen3_5_text
"""


@pytest.mark.parametrize("family", FAMILIES.split())
def test_streaming_gives_the_perplexity_of_the_whole_model(family, ids, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", family)
    whole = score(dense, ids, batch=2, stream=False)
    parts = score(dense, ids, batch=2, stream=True)
    assert (whole.streamed, parts.streamed) == (False, True)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert (parts.windows, parts.protocol) == (whole.windows, whole.protocol)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_streaming_gives_the_same_bits(tied, dtype, ids, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "llama", torch.bfloat16, tie_word_embeddings=tied)
    losses = {score(dense, ids, dtype=dtype, stream=stream).loss for stream in (False, True)}
    assert len(losses) == 1


def test_every_tensor_is_read_once(monkeypatch, ids, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", tie_word_embeddings=False)
    seen: Counter[str] = Counter()
    original = Checkpoint.read

    def counting(self, names, *options):
        names = list(names)
        seen.update(names)
        return original(self, names, *options)

    monkeypatch.setattr(Checkpoint, "read", counting)
    score(dense, ids, stream=True)
    # Final norm and rotary tables come with the embedding and with the head.
    assert {name for name, count in seen.items() if count > 1} == {"model.norm.weight"}
    assert set(seen) == set(Checkpoint(dense).tensors)


def test_what_does_not_fit_is_streamed_and_what_does_is_not(monkeypatch, ids, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", hidden_size=64, num_hidden_layers=12)
    monkeypatch.setattr(streamed, "process_memory", lambda: 0)
    need = streamed.whole_bytes(dense, 24, ComputeOptions("auto", torch.device("cpu")))
    large = sum(path.stat().st_size for path in dense.glob("*.safetensors"))
    assert large < need < 2 * large
    assert not score(dense, ids, memory=need).streamed
    assert score(dense, ids, memory=need - 1).streamed
    assert score(dense, ids, memory=f"{need // 2048}KB").streamed
    with pytest.raises(ValueError, match=r"block by block needs .* the memory budget is .* Raise"):
        score(dense, ids, memory=large // 12)


def test_a_block_that_breaks_is_named(ids, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight holds weights"):
        score(dense, ids, stream=True)


def test_compressed_models_are_streamed_and_quantised_ones_of_other_programs_are_not(ids, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "llama", torch.bfloat16)
    prunus.compress(dense, tmp_path / "small", 8, calibration=token_ids())
    whole = score(tmp_path / "small", ids, stream=False)
    assert score(tmp_path / "small", ids, stream=True).loss == whole.loss
    config = json.loads((dense / "config.json").read_text())
    described = {"quantization_config": {"quant_method": "fp8"}}
    (dense / "config.json").write_text(json.dumps(config | described))
    with pytest.raises(ValueError, match="is quantised, which is scored with the whole"):
        score(dense, ids, stream=True)


def test_the_command_streams(ids, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense")
    options = ["--perplexity", ids, "--seqlen", 24, "--json", tmp_path / "out.json"]
    call("eval", dense, *options, "--stream", "--memory", "4GB")
    assert '"streamed": true' in (tmp_path / "out.json").read_text()
    call("eval", dense, *options)
    assert '"streamed": false' in (tmp_path / "out.json").read_text()
