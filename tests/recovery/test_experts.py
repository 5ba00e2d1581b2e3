"""Mixtures of experts: all experts learn, zeros stay, and every verb takes a smaller one."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prunus.model.experts import Experts, find_fused_experts, split_loaded_experts
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.structure.run import shrink
from recovery_cases import dense_checkpoint, pruned_checkpoint, recover
from tiny import EXPERT_FAMILIES, tiny_model, token_ids

#: One by one or fused in the file; with and without biases, shared experts, dense blocks.
FAMILIES = ["deepseek_v3", "gpt_oss", "granitemoe", "mixtral", "qwen3_moe"]


@pytest.mark.parametrize("family", sorted(EXPERT_FAMILIES))
def test_a_loaded_model_with_single_experts_computes_what_the_fused_one_does(family):
    model, ids = tiny_model(family), token_ids(2, 8)
    single = copy.deepcopy(model)
    split_loaded_experts(single)
    assert find_fused_experts(model)
    assert not find_fused_experts(single)
    assert any(isinstance(module, Experts) for module in single.modules())
    assert not single.training
    with torch.no_grad():
        expected, found = (m(ids, use_cache=False).logits for m in (model, single))
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert sum(p.numel() for p in single.parameters()) == sum(p.numel() for p in model.parameters())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the blocks, with one linear per expert."""
    source = CheckpointSource(folder)
    skeleton = Skeleton(source.config, source.stored_dtype)
    source.bind(skeleton)
    return {
        f"{index}.{name}": x
        for index in range(len(skeleton))
        for name, x in source.block(index).items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_and_routers_of_a_smaller_mixture_learn(family, text, tmp_path):
    teacher = dense_checkpoint(tmp_path / "teacher", family)
    small = tmp_path / "small"
    shrink(teacher, small, experts=0.5, repair=False, calibration=token_ids(), dtype="float32")
    record = recover(small, tmp_path / "out", "full", text)
    assert record.best > 0
    before, after = tensors(small), tensors(tmp_path / "out")
    assert {k: (x.shape, x.dtype) for k, x in before.items()} == {
        k: (x.shape, x.dtype) for k, x in after.items()
    }
    same = {key for key, x in before.items() if torch.equal(x, after[key])}
    # The bias by which DeepSeek-V3 corrects its router's choice is no parameter.
    assert not {key for key in same if "correction_bias" not in key}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_zeros_of_experts_stay(text, tmp_path):
    dense = dense_checkpoint(tmp_path / "dense", "qwen3_moe")
    pruned = pruned_checkpoint(tmp_path / "pruned", dense, sparsity=0.5)
    record = recover(pruned, tmp_path / "out", "masked", text)
    before, after = tensors(pruned), tensors(tmp_path / "out")
    experts = [key for key in before if ".experts." in key]
    assert len(experts) == 2 * 8 * 3
    for key in experts:
        assert torch.equal(before[key] == 0, after[key] == 0), key
    assert sum(not torch.equal(before[key], after[key]) for key in experts) > len(experts) // 2
    assert len(record.linears) == len(experts) + 2 * 4


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_shrink_prune_and_recover_follow_each_other(family, text, tmp_path):
    """The recipe of the page about smaller models, with its record of what was removed."""
    teacher = tmp_path / "teacher"
    dense_checkpoint(teacher, family, torch.bfloat16)
    folders = [tmp_path / name for name in ("a", "b", "c", "d")]
    small, better, sparse, recovered = folders
    what = {"experts": 4} if family == "qwen3_moe" else {"blocks": 1}
    shrink(teacher, small, calibration=token_ids(), dtype="float32", **what)
    recover(small, better, "full", text, teacher=teacher, tokens=160)
    pruned_checkpoint(sparse, better, sparsity=0.5)
    recover(sparse, recovered, "masked", text, teacher=teacher, tokens=160)
    for folder in (better, sparse, recovered):
        assert (folder / "prunus-structure.json").exists()
    zeros = [float((x == 0).float().mean()) for k, x in tensors(recovered).items() if "proj" in k]
    assert all(share == pytest.approx(0.5, abs=0.01) for share in zeros)
    AutoModelForCausalLM.from_pretrained(recovered)
