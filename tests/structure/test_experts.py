"""Experts that go: the smaller model computes what the old one does without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from prunus.methods.solvers.least_squares import ridge
from structure_cases import shrink_without_repair as shrink
from structure_cases import zero_what_went
from tiny import EXPERT_FAMILIES, tiny_checkpoint, token_ids

#: Families whose router chooses among groups of experts.
GROUPED = {
    "deepseek_v3": {"n_group": 2, "topk_group": 1},
    "glm4_moe": {"n_group": 2, "topk_group": 2},
}


def stored(folder: Path) -> dict[str, Tensor]:
    return {
        key: x
        for path in sorted(folder.glob("*.safetensors"))
        for key, x in load_file(path).items()
    }


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def masked_logits(
    monkeypatch: pytest.MonkeyPatch, model: Any, ids: Tensor, gone: dict[int, list[int]]
) -> Tensor:
    """The logits of the old model when the router's logits of some experts are -inf.

    Every router multiplies by its weight with `torch.nn.functional.linear`, whatever its family.
    """
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    routers: dict[int, list[int]] = {}
    for index, numbers in gone.items():
        for name, tensor in layers[index].state_dict(keep_vars=True).items():
            if ".experts." in name or "shared" in name:
                continue
            if name.endswith("correction_bias") or name.endswith("expert_bias"):
                tensor.data[..., numbers] = -torch.inf
            elif tensor.dim() == 2 and any(part in name for part in (".gate.", ".router.", ".wg.")):
                routers[id(tensor)] = numbers
    assert len(routers) == len(gone)
    linear = torch.nn.functional.linear

    def masked(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = linear(x, weight, bias)
        if id(weight) in routers:
            out = out.clone()
            out[..., routers[id(weight)]] = -torch.inf
        return out

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "linear", masked)
        # A router may hand a converted copy to `linear`; in float32 it is the weight itself.
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", sorted(EXPERT_FAMILIES))
def test_the_result_is_the_old_model_without_the_routers_choices_of_lost_experts(
    family, tmp_path, monkeypatch
):
    dense = tiny_checkpoint(tmp_path / "dense", family, **GROUPED.get(family, {}))
    ids = token_ids()
    record = shrink(dense, tmp_path / "small", experts=0.5, calibration=ids, batch=2)
    changed = {i: block.experts for i, block in enumerate(record.blocks) if block.experts}
    assert changed
    gone = {i: sorted(set(range(len(x.saliency))) - set(x.kept)) for i, x in changed.items()}
    assert all(len(x) == len(changed[i].saliency) // 2 for i, x in gone.items())
    expected = masked_logits(monkeypatch, loaded(dense), ids, gone)
    with torch.no_grad():
        small = loaded(tmp_path / "small")
        found = small(ids, use_cache=False).logits
        original = loaded(dense)(ids, use_cache=False).logits
        made = small.generate(ids[:1, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    close = 1e-5 * float(original.abs().max())
    assert float((found - expected).abs().max()) <= close
    assert float((found - original).abs().max()) > 100 * close, "the lost experts did nothing"
    assert made.shape == (1, 7)
    # What stays has the same bytes, under a name of the checkpoint, with the tokens' counts beside.
    before = stored(dense)
    for key, tensor in stored(tmp_path / "small").items():
        same = any(x.shape == tensor.shape and torch.equal(x, tensor) for x in before.values())
        rows = key in before and before[key].shape != tensor.shape
        assert same or rows, key
    assert record.totals["parameters"] < record.totals["parameters_before"]


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "gpt_oss", "granitemoeshared", "mixtral", "qwen2_moe"]
)
def test_experts_heads_and_the_width_of_experts_go_in_one_run(family, tmp_path, monkeypatch):
    """Also shared experts, a dense MLP in front of the experts, and a joined gate and up."""
    dense, ids = tiny_checkpoint(tmp_path / "dense", family), token_ids()
    options = {"experts": 0.5, "width": 0.5, "width_update": "none", "calibration": ids}
    record = shrink(dense, tmp_path / "small", batch=2, **options)
    model = loaded(dense).requires_grad_(False)
    before = model(ids, use_cache=False).logits
    assert zero_what_went(model, record) > 2 * len(record.blocks)
    gone = {
        i: sorted({*range(len(x.saliency))} - {*x.kept})
        for i, block in enumerate(record.blocks)
        if (x := block.experts)
    }
    expected = masked_logits(monkeypatch, model, ids, gone)
    with torch.no_grad():
        found = loaded(tmp_path / "small")(ids, use_cache=False).logits
    close = 1e-5 * float(before.abs().max())
    assert float((found - expected).abs().max()) <= close
    assert float((found - before).abs().max()) > 100 * close


def test_the_columns_of_an_expert_are_fitted_to_its_own_tokens(tmp_path):
    dense, ids = tiny_checkpoint(tmp_path / "dense", "qwen3_moe", num_hidden_layers=1), token_ids()
    record = shrink(dense, tmp_path / "small", width=0.5, heads=4, calibration=ids, batch=2)
    old, new = loaded(dense), loaded(tmp_path / "small")
    experts, calls = old.model.layers[0].mlp.experts, []
    experts.register_forward_pre_hook(lambda _m, args: calls.append(args))
    with torch.no_grad():
        old(ids, use_cache=False)
    ((X_TH, chosen_TK, _),) = calls
    for number in range(8):
        mine_TH = X_TH[(chosen_TK == number).any(1)]
        gate, up = (mine_TH @ experts.gate_up_proj[number].T).chunk(2, dim=-1)
        X_TI = (torch.nn.functional.silu(gate) * up).double().detach()
        kept = record.blocks[0].width.mlps[f"mlp.experts.{number}.down_proj"].kept
        gram = X_TI.T @ X_TI
        gram += ridge(16, len(X_TI)) * gram.diagonal().diag()
        weight = experts.down_proj[number].double()
        expected = (weight @ gram[:, kept]) @ torch.linalg.inv(gram[kept][:, kept])
        fitted = new.model.layers[0].mlp.experts.down_proj[number].double()
        torch.testing.assert_close(fitted, expected, rtol=1e-3, atol=1e-5)
