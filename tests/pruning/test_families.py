"""Every family gets the same weights streamed, in place, and from a naive reference."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunus
from reference import assert_three_ways_agree, wanda_by_whole_runs
from tiny import FAMILIES, tiny_model, token_ids


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_streaming_equals_in_memory_equals_naive(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "dense")
    ids = token_ids()
    report = prunus.prune(
        tmp_path / "dense", tmp_path / "pruned", sparsity=0.5, calibration=ids, batch=2
    )
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto")
    naive = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    wanda_by_whole_runs(naive, ids)
    prunus.prune(model, sparsity=0.5, calibration=ids, batch=2)
    assert report.totals["sparsity"] == pytest.approx(0.5)
    assert_three_ways_agree(streamed, model, naive)


def test_the_result_generates_and_keeps_its_settings(tmp_path):
    model = tiny_model("llama", torch.bfloat16, tie_word_embeddings=True)
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "dense")
    prunus.prune(tmp_path / "dense", tmp_path / "pruned", calibration=token_ids())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.generation_config.temperature == 0.7
    out = loaded.generate(token_ids(1, 4), max_new_tokens=3, do_sample=False, temperature=None)
    assert out.shape == (1, 7)
    config = (tmp_path / "pruned" / "config.json").read_text()
    assert "sparsity_config" not in config
    assert config == (tmp_path / "dense" / "config.json").read_text()


def test_experts_in_an_unknown_form_are_refused_by_name(tmp_path):
    # Llama 4 gives every token to every expert, scaled by the router. No tokens are routed.
    options = {"num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": 8}
    tiny_model("llama4_text", **options).save_pretrained(tmp_path / "dense")
    with pytest.raises(NotImplementedError, match=r"experts.*form that prunus does not know"):
        prunus.prune(tmp_path / "dense", tmp_path / "pruned", calibration=token_ids())
    assert not (tmp_path / "pruned").exists()


def test_weights_that_stay_dense_in_a_block_are_named(tmp_path):
    model = tiny_model("llama")
    report = prunus.prune(model, calibration=token_ids(), ignore=["*.q_proj", "*.1.mlp.*"])
    dense = set(report.left_dense)
    assert "model.layers.0.self_attn.q_proj.weight" in dense
    assert "model.layers.1.mlp.down_proj.weight" in dense
    assert "model.layers.0.mlp.down_proj.weight" not in dense
