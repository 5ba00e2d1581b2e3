"""Removed experts: the smaller model computes what the old one does without them."""

from typing import Any

import pytest
import torch
from torch import Tensor

import prunus
from structure_cases import assert_same_logits, loaded, logits, stored
from structure_cases import shrink_without_repair as shrink
from tiny import EXPERT_FAMILIES, tiny_checkpoint, token_ids

IDS = token_ids()
#: Families whose router chooses among groups of experts.
GROUPED = {
    "deepseek_v3": {"n_group": 2, "topk_group": 1},
    "glm4_moe": {"n_group": 2, "topk_group": 2},
}


def masked_logits(
    monkeypatch: pytest.MonkeyPatch, model: Any, gone: dict[int, list[int]]
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

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", masked)
        # A router may hand a converted copy to `linear`; in float32 it is the weight itself.
        return logits(model, IDS)


def test_a_model_that_returns_what_its_routers_say_is_repaired(tmp_path):
    """transformers then computes a loss of the routers' balance, also of the stubs of blocks."""
    dense = tiny_checkpoint(tmp_path / "dense", "mixtral", output_router_logits=True)
    options: dict[str, Any] = {"experts": 3, "calibration": IDS, "batch": 2}
    assert prunus.shrink(dense, tmp_path / "small", **options).state == "finished"


@pytest.mark.parametrize("family", sorted(EXPERT_FAMILIES))
def test_the_result_is_the_old_model_without_the_routers_choices_of_lost_experts(
    family, tmp_path, monkeypatch
):
    dense = tiny_checkpoint(tmp_path / "dense", family, **GROUPED.get(family, {}))
    options: dict[str, Any] = {"experts": 0.5, "calibration": IDS, "batch": 2}
    record = shrink(dense, tmp_path / "small", **options)
    changed = {i: block.experts for i, block in enumerate(record.blocks) if block.experts}
    gone = {i: sorted(set(range(len(x.saliency))) - set(x.kept)) for i, x in changed.items()}
    assert changed
    assert all(len(x) == len(changed[i].saliency) // 2 for i, x in gone.items())
    model, small = loaded(dense), loaded(tmp_path / "small")
    original = logits(model, IDS)
    assert_same_logits(logits(small, IDS), masked_logits(monkeypatch, model, gone), original)
    made = small.generate(IDS[:1, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert made.shape == (1, 7)
    assert record.totals["parameters"] < record.totals["parameters_before"]
    # What stays has the same bytes, under a name of the checkpoint.
    before = stored(dense)
    for key, tensor in stored(tmp_path / "small").items():
        same = any(x.shape == tensor.shape and torch.equal(x, tensor) for x in before.values())
        rows = key in before and before[key].shape != tensor.shape
        assert same or rows, key


def experts_and_inputs(dense: Any) -> tuple[Any, tuple[Tensor, Tensor, Tensor]]:
    """The experts of a model of one block, and what they are given on all windows."""
    model = loaded(dense)
    experts, calls = model.model.layers[0].mlp.experts, []
    experts.register_forward_pre_hook(lambda _module, args: calls.append(args))
    logits(model, IDS)
    (inputs,) = calls
    return experts, inputs


def test_saliencies_are_sums_of_weight_times_norm_of_the_output(tmp_path):
    """Against the fused experts of transformers, token by token."""
    dense = tiny_checkpoint(tmp_path / "dense", "qwen3_moe", num_hidden_layers=1)
    experts, (X_TH, chosen_TK, weight_TK) = experts_and_inputs(dense)
    values: list[list[float]] = [[] for _ in range(8)]
    for token, chosen in enumerate(chosen_TK.tolist()):
        for slot, expert in enumerate(chosen):
            gate, up = (experts.gate_up_proj[expert] @ X_TH[token]).chunk(2)
            out = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            values[expert].append(float(weight_TK[token, slot] * out.norm()))
    expected = {
        "reap": [sum(x) / max(1, len(x)) for x in values],
        "contribution": [sum(x) / sum(map(sum, values)) for x in values],
    }
    for rule, saliency in expected.items():
        options = {"experts": 5, "saliency": rule, "calibration": IDS, "batch": 2}
        change = shrink(dense, tmp_path / rule, **options).blocks[0].experts
        assert change.saliency == pytest.approx(saliency, rel=1e-4)
        assert change.tokens == [len(x) for x in values]
        assert change.kept == sorted(sorted(range(8), key=saliency.__getitem__)[3:])
