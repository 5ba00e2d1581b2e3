"""A run that makes a model smaller: saliencies, interruption, and requests that cannot be met."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from command_line import call
from prunus.model.checkpoint.digests import verify_shards
from prunus.structure.recipe import StructureRecipe, load_structure_recipe
from prunus.structure.record import RECORD_NAME
from structure_cases import bytes_of, shrunk_with_a_kill
from structure_cases import shrink_without_repair as shrink
from tiny import tiny_checkpoint, token_ids


def test_reap_is_the_mean_of_weight_times_norm_of_the_output(tmp_path):
    """Against the fused experts of transformers, token by token."""
    dense = tiny_checkpoint(tmp_path / "dense", "qwen3_moe", num_hidden_layers=1)
    ids = token_ids()
    found = {
        rule: shrink(dense, tmp_path / rule, experts=5, saliency=rule, calibration=ids, batch=2)
        for rule in ("reap", "contribution", "frequency", "magnitude")
    }
    model: Any = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    experts, calls = model.requires_grad_(False).model.layers[0].mlp.experts, []
    experts.register_forward_pre_hook(lambda _m, args: calls.append(args))
    with torch.no_grad():
        model(ids, use_cache=False)
        ((X_TH, chosen_TK, weight_TK),) = calls
        values: list[list[float]] = [[] for _ in range(8)]
        for token, chosen in enumerate(chosen_TK.tolist()):
            for slot, expert in enumerate(chosen):
                gate, up = (experts.gate_up_proj[expert] @ X_TH[token]).chunk(2)
                out = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                values[expert].append(float(weight_TK[token, slot] * out.norm()))
    reap = [sum(x) / max(1, len(x)) for x in values]
    changes = {rule: record.blocks[0].experts for rule, record in found.items()}
    assert changes["reap"].saliency == pytest.approx(reap, rel=1e-4)
    assert changes["reap"].tokens == [len(x) for x in values]
    sums = [sum(x) / sum(map(sum, values)) for x in values]
    assert changes["contribution"].saliency == pytest.approx(sums, rel=1e-4)
    shares = [len(x) / sum(map(len, values)) for x in values]
    assert changes["frequency"].saliency == pytest.approx(shares)
    norms = [
        float((experts.gate_up_proj[e].square().sum() + experts.down_proj[e].square().sum()).sqrt())
        for e in range(8)
    ]
    assert changes["magnitude"].saliency == pytest.approx(norms, rel=1e-5)
    for change in changes.values():
        best = sorted(range(8), key=lambda e: change.saliency[e], reverse=True)[:5]
        assert change.kept == sorted(best)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_killed_run_goes_on_to_the_same_bytes(family, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", family)
    options: dict[str, Any] = {"experts": 3, "calibration": token_ids(), "batch": 2}
    shrink(dense, tmp_path / "whole", **options)
    shrunk_with_a_kill(dense, tmp_path / "killed", 1, **options)
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "killed")
    assert verify_shards(tmp_path / "killed") == 3
    before = (tmp_path / "killed" / RECORD_NAME).read_bytes()
    shrink(dense, tmp_path / "killed", **options)
    assert (tmp_path / "killed" / RECORD_NAME).read_bytes() == before


def test_a_smaller_model_is_made_smaller_and_pruned_like_any_other(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "mixtral")
    run = {"calibration": token_ids(), "batch": 2}
    shrink(dense, tmp_path / "three", experts=3, **run)
    shrink(tmp_path / "three", tmp_path / "two", experts=2, **run)
    assert verify_shards(tmp_path / "two") == 3
    import prunus

    manifest = prunus.prune(tmp_path / "two", tmp_path / "pruned", sparsity=0.5, **run)
    assert manifest.totals["expert_linears"] == 2 * 2 * 3
    AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("llama", {"experts": 0.5}, "no mixture of experts"),
        ("mixtral", {"experts": 1}, "a token chooses 2 of them: possible numbers to keep are 2, 3"),
        ("mixtral", {"experts": 4}, "possible numbers to keep are 2, 3"),
        ("mixtral", {"experts": 0.9}, "0.9 would keep 0 of the 4 experts"),
        ("mixtral", {"experts": 1.5}, "a share to remove in (0, 1), such as 0.25, or a number"),
        ("mixtral", {}, "nothing is to be removed"),
        ("mixtral", {"experts": 3, "sampels": 3}, "unknown option 'sampels'"),
        ("grouped", {"experts": 5}, "they form 2 groups of one size, of which a token uses 1"),
        ("grouped", {"experts": 5}, "possible numbers to keep are 4, 6"),
    ],
)
def test_what_cannot_be_ends_before_any_work_and_says_what_can(family, options, said, tmp_path):
    groups = {"n_group": 2, "topk_group": 1}
    dense = (
        tiny_checkpoint(tmp_path / "dense", "deepseek_v3", **groups)
        if family == "grouped"
        else tiny_checkpoint(tmp_path / "dense", family)
    )
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
        shrink(dense, tmp_path / "small", calibration=token_ids(), **options)
    assert not (tmp_path / "small").exists()


def test_the_magnitude_of_experts_needs_no_text(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "mixtral")  # it has no tokenizer either
    record = shrink(dense, tmp_path / "small", experts=3, saliency="magnitude")  # and no repair
    assert record.inputs.calibration.startswith("none")
    assert all(block.experts.tokens == [0] * 4 for block in record.blocks)


def test_experts_at_random_follow_the_seed_and_differ_between_blocks(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "qwen3_moe", num_hidden_layers=3)
    options: dict[str, Any] = {"experts": 4, "saliency": "random"}
    kept = [
        [
            block.experts.kept
            for block in shrink(dense, tmp_path / name, seed=seed, **options).blocks
        ]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert kept[0] == kept[1] != kept[2]
    assert kept[0][0] != kept[0][1] != kept[0][2]


def test_a_recipe_is_read_from_what_it_writes(tmp_path):
    recipe = StructureRecipe(experts=6, blocks=0.25, block_rule="cosine", calibration='a "b".txt')
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    assert load_structure_recipe(path, {"seed": None}) == recipe
    assert load_structure_recipe(recipe, {"experts": "0.5"}).experts == 0.5
    assert load_structure_recipe(path, {"experts": "5"}).experts == 5


def test_the_verb_prints_what_changed_and_refuses_in_one_line(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "mixtral")
    ids = tmp_path / "ids.safetensors"
    from safetensors.torch import save_file

    save_file({"input_ids": token_ids()}, ids)
    common = ("--calibration", ids, "--samples", 6, "--seqlen", 16)
    result = call("shrink", dense, tmp_path / "small", "--experts", 0.25, *common)
    assert result.exit_code == 0, result.output
    assert "num_local_experts" in result.output
    assert "3 of 4 experts stay in each of 2 layers" in result.output
    result = call("shrink", dense, tmp_path / "other", "--experts", 1, *common, status=2)
    assert "possible numbers to keep are 2, 3" in result.output
    assert not (tmp_path / "other").exists()
