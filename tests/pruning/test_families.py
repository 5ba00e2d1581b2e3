"""Every family gets the same weights streamed, in place, and from a naive reference."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import prunus
from tiny import FAMILIES, NEWER_FAMILIES, tiny_model, token_ids, weights


def naive_wanda(model: nn.Module, ids: torch.Tensor, batch: int, sparsity: float) -> None:
    """Prune in place: run the whole model, prune the first linear that is still dense, repeat.

    A linear whose weight the model reads without calling it (`dt_proj` of Mamba) is pruned at the
    end of its block, as if all its inputs were equal.
    """
    head = model.get_output_embeddings()
    block_list = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    block_of = {m: number for number, block in enumerate(block_list) for m in block.modules()}
    todo = [m for m in block_list.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    while todo:
        seen: list[tuple[nn.Module, torch.Tensor]] = []
        hooks = [
            module.register_forward_pre_hook(
                lambda m, args: seen.append((m, args[0].detach().clone()))  # noqa: B023
            )
            for module in todo
        ]
        firsts = []
        for part in ids.split(batch):
            seen.clear()
            with torch.no_grad():
                model(input_ids=part, use_cache=False)
            firsts += seen[:1]
        for hook in hooks:
            hook.remove()
        module = firsts[0][0] if firsts else todo[0]
        assert all(first[0] is module for first in firsts)
        if block_of[todo[0]] < block_of[module]:
            module, firsts = todo[0], []
        if firsts:
            X_TI = torch.cat([x.reshape(-1, x.shape[-1]) for _, x in firsts])
        else:
            X_TI = torch.ones(1, module.weight.shape[1])
        weight_OI = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
        score_OI = weight_OI.abs() * X_TI.double().square().sum(0).sqrt().float()
        for row in range(len(score_OI)):
            lowest = score_OI[row].sort(stable=True).indices[: int(score_OI.shape[1] * sparsity)]
            weight_OI[row, lowest] = 0
        todo.remove(module)


@pytest.mark.parametrize("family", sorted(FAMILIES | NEWER_FAMILIES))
def test_streaming_equals_in_memory_equals_naive(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "dense")
    ids = token_ids()
    report = prunus.prune(
        tmp_path / "dense", tmp_path / "pruned", sparsity=0.5, calibration=ids, batch=2
    )
    streamed = weights(tmp_path / "pruned")

    naive = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    naive_wanda(naive, ids, 2, 0.5)
    prunus.prune(model, sparsity=0.5, calibration=ids, batch=2)
    in_place = model.state_dict()

    assert report.totals["sparsity"] == pytest.approx(0.5)
    assert streamed.keys() == in_place.keys()
    for name, tensor in streamed.items():
        assert torch.equal(tensor, in_place[name]), name
        assert torch.equal(tensor, naive.state_dict()[name]), name


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
