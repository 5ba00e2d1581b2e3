"""Removed blocks and experts: the smaller model computes what the old one does without them."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import prunus
from image_text import IMAGE_TEXT_MODELS, image_text_checkpoint, loaded_with_images
from prunus.model.linears import find_block_list
from prunus.structure import search
from prunus.structure.structure_record import StructureRecord
from structure_cases import (
    assert_same_logits,
    bytes_of,
    divergence,
    loaded,
    logits,
    shrink_killed_in_second_step,
    stored,
)
from structure_cases import shrink_without_repair as shrink
from tiny import EXPERT_FAMILIES, FAMILIES, tiny_checkpoint, token_ids

IDS = token_ids()
#: Hybrids that may lose their only attention layer here, without which transformers has no cache.
HYBRIDS = {"bamba", "granitemoehybrid", "jamba", "nemotron_h"}
#: Their configurations count blocks as Llama's does, and have no list with an entry per block.
LIKE_LLAMA = """
apertus arcee bitnet codegen cohere gemma glm gpt_neox granite ministral3 mistral nemotron olmo
olmo2 phi phi3 qwen3 seed_oss smollm3 stablelm starcoder2
"""
ALL = sorted({*FAMILIES, *EXPERT_FAMILIES} - {*LIKE_LLAMA.split()})


@pytest.mark.parametrize("family", ALL)
def test_the_result_is_the_old_model_with_blocks_jumped_over(family, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", family)
    record = shrink(dense, tmp_path / "small", blocks=1, calibration=IDS)
    gone = [step.block for step in record.search]
    assert len(gone) == 1
    model, small = loaded(dense), loaded(tmp_path / "small")
    assert_same_logits(logits(small, IDS), logits(model, IDS, gone), logits(model, IDS))
    if family not in HYBRIDS:
        small.generate(IDS[:1, :4], max_new_tokens=2, do_sample=False)


def test_a_block_that_the_configuration_needs_stays(tmp_path):
    """Every second block is a mixture of experts, counted from the first: only the last may go."""
    dense = tiny_checkpoint(tmp_path / "dense", "qwen2_moe", decoder_sparse_step=2)
    model = loaded(dense)
    for weight in model.model.layers[0].parameters():
        weight.data.mul_(0.01)  # the block that the measurement would choose
    model.save_pretrained(dense)
    record = shrink(dense, tmp_path / "small", blocks=1, calibration=IDS)
    values = record.search[0].candidates
    assert values[0] < values[1]
    assert record.search[0].block == 1


def test_the_search_measures_and_chooses_as_a_slow_one(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=5)
    record = shrink(dense, tmp_path / "small", blocks=2, calibration=IDS, batch=2)
    model, gone = loaded(dense), []
    for number, step in enumerate(record.search):
        left = [i for i in range(5) if i not in gone]
        values = {i: divergence(model, model, IDS, [*gone, i]) for i in left}
        measured = {i: v for i, v in enumerate(step.candidates) if v is not None}
        assert measured.keys() == values.keys() if number == 0 else measured.keys() <= {*left}
        assert measured == pytest.approx({i: values[i] for i in measured}, rel=1e-3)
        assert step.block == min(measured, key=measured.__getitem__)
        assert step.value == measured[step.block]
        gone.append(step.block)
    assert [block.made_from for block in record.blocks] == sorted({*range(5)} - {*gone})


def test_a_killed_search_continues_to_the_same_bytes(tmp_path, monkeypatch):
    dense = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=6)
    options: dict[str, Any] = {"blocks": 3, "calibration": IDS}
    whole = shrink(dense, tmp_path / "whole", **options)
    killed = tmp_path / "killed"
    shrink_killed_in_second_step(monkeypatch, search, "divergences", dense, killed, **options)
    assert len(StructureRecord.load(killed).search) == 1
    again = shrink(dense, killed, resume=True, **options)
    assert [x.block for x in again.search] == [x.block for x in whole.search]
    assert bytes_of(tmp_path / "whole") == bytes_of(killed)


def test_blocks_and_experts_are_removed_in_one_run(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "qwen3_moe", num_hidden_layers=3)
    record = shrink(dense, tmp_path / "small", blocks=2, experts=4, calibration=IDS)
    before, small = loaded(dense), loaded(tmp_path / "small")
    assert small.config.num_hidden_layers == 2
    for place, block in enumerate(record.blocks):
        assert len(block.experts.kept) == 4
        old = before.model.layers[block.made_from].mlp.experts
        new = small.model.layers[place].mlp.experts
        assert torch.equal(new.down_proj, old.down_proj[block.experts.kept])


# --- the language model inside an image-text model ---


@pytest.mark.parametrize("family", sorted(IMAGE_TEXT_MODELS))
def test_blocks_are_removed_and_all_outside_them_keeps_its_bytes(family, tmp_path):
    dense, ids = image_text_checkpoint(tmp_path / "dense", family), token_ids()
    options = {"blocks": 1, "dtype": "float32", "calibration": ids, "batch": 2}
    record = shrink(dense, tmp_path / "small", **options)
    (gone,) = [step.block for step in record.search]
    model, small = loaded_with_images(dense), loaded_with_images(tmp_path / "small")
    before = logits(model, ids)
    assert_same_logits(logits(small, ids), logits(model, ids, [gone]), before)
    outside = {
        key: x for key, x in stored(dense).items() if ".layers." not in key or "vision" in key
    }
    found = stored(tmp_path / "small")
    assert all(torch.equal(found[key], x) for key, x in outside.items())
    assert len(outside) > 10
    assert record.config["text_config.num_hidden_layers"] == (2, 1)
    raw = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("dense", "small")]
    assert raw[0]["vision_config"] == raw[1]["vision_config"]
    assert gone == 1 or family != "qwen3_vl"  # the first block is given features of images


def test_blocks_that_are_given_features_of_images_stay(tmp_path):
    dense = image_text_checkpoint(tmp_path / "dense", "qwen3_vl", deepstack_visual_indexes=[0, 1])
    with pytest.raises(NotImplementedError, match=r"block \d of .* cannot be removed: features of"):
        shrink(dense, tmp_path / "small", blocks=1, calibration=token_ids())
    assert not (tmp_path / "small").exists()


def test_an_older_file_has_the_fields_of_the_language_model_next_to_the_others(tmp_path):
    dense = image_text_checkpoint(tmp_path / "dense", "qwen2_vl")
    path = dense / "config.json"
    raw = json.loads(path.read_text())
    text = raw.pop("text_config")
    path.write_text(json.dumps({**{k: v for k, v in text.items() if k != "model_type"}, **raw}))
    options: dict[str, Any] = {"blocks": 1, "calibration": token_ids()}
    shrink(dense, tmp_path / "small", **options)
    assert len(find_block_list(loaded_with_images(tmp_path / "small"))[1]) == 1
    assert json.loads((tmp_path / "small" / "config.json").read_text())["num_hidden_layers"] == 1


# --- experts ---

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
