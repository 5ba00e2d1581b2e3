"""Channels and heads that go: what is cut, what is chosen, and what makes up for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from prunus.methods.solvers.least_squares import ridge
from prunus.methods.structured import channels
from prunus.methods.structured.channels import fit_columns, keep_units
from structure_cases import bytes_of, logits, shrunk_with_a_kill, zero_what_went
from structure_cases import shrink_without_repair as shrink
from tiny import tiny_checkpoint, token_ids

_NAMES = """
apertus arcee bamba cohere exaone4 gemma gemma2 gemma3_text gemma4_text glm granite jamba lfm2 llama
ministral3 mistral nemotron olmo phi phi3 qwen2 qwen3 qwen3_5_text seed_oss smollm3 starcoder2
"""
#: Families whose heads cannot become fewer.
_CHANNELS_ALONE = "falcon gpt2 gpt_neo gpt_neox olmo2 opt stablelm"
FAMILIES = {name: {"width": 0.5} for name in _NAMES.split()}
FAMILIES |= {name: {"width": 0.5, "heads": 4} for name in _CHANNELS_ALONE.split()}


def loaded(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_without_a_fit_the_result_is_the_old_model_with_zeros_for_what_went(family, tmp_path):
    dense, ids = tiny_checkpoint(tmp_path / "dense", family), token_ids()
    options = {**FAMILIES[family], "calibration": ids, "batch": 2}
    record = shrink(dense, tmp_path / "small", width_update="none", **options)
    model, small = loaded(dense), loaded(tmp_path / "small")
    before = logits(model, ids)
    assert zero_what_went(model, record) >= 2
    expected = logits(model, ids)
    assert float((logits(small, ids) - expected).abs().max()) <= 1e-5 * float(before.abs().max())
    assert float((expected - before).abs().max()) > 1e-4 * float(before.abs().max())
    small.generate(ids[:1, :4], max_new_tokens=2, do_sample=False)


def inputs_of(model: Any, name: str, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _m, args: seen.append(args[0])
    )
    logits(model, ids)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).double()


def test_a_data_limited_linear_gets_the_same_channels_and_fit_in_float32(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    X_TI = torch.randn(100, 200, generator=generator) * torch.rand(200, generator=generator)
    weight, gram = torch.randn(20, 200, generator=generator), X_TI.T @ X_TI
    found = []
    for limited in (True, False):
        monkeypatch.setattr(channels, "is_data_limited", lambda _inputs, _damping, is_=limited: is_)
        kept = keep_units(weight, gram, 200, 1, 120, 1.0)
        found.append((kept.columns, fit_columns(weight, gram, kept.columns, 1.0)))
    (limited, fit), (exact, exact_fit) = found
    assert limited == exact
    torch.testing.assert_close(fit, exact_fit, rtol=1e-4, atol=1e-5)
    assert not torch.equal(fit, exact_fit)


@pytest.mark.parametrize("family", ["llama", "starcoder2"])
def test_the_columns_that_stay_are_the_least_squares_fit(family, tmp_path):
    """Against ordinary least squares with a ridge, with a column of ones where there is a bias."""
    dense, ids = tiny_checkpoint(tmp_path / "dense", family), token_ids()
    record = shrink(dense, tmp_path / "small", heads=2, calibration=ids)
    name = "model.layers.0.self_attn.o_proj"
    X_TI = inputs_of(loaded(dense), name, ids)
    old, new = loaded(dense).get_submodule(name), loaded(tmp_path / "small").get_submodule(name)
    part = record.blocks[0].width.heads
    columns = [8 * head + i for head in part.kept for i in range(8)]
    weight = old.weight.double()
    if old.bias is not None:
        X_TI = torch.cat([X_TI, torch.ones(len(X_TI), 1)], 1)
        weight = torch.cat([weight, old.bias.double()[:, None]], 1)
        columns = [*columns, 32]
    gram = X_TI.T @ X_TI
    # The ridge pulls towards the trained weights, so it stands beside both sides.
    damped = gram + ridge(32, len(X_TI)) * gram.diagonal().diag()
    expected = (weight @ damped[:, columns]) @ torch.linalg.inv(damped[columns][:, columns])
    found = new.weight if old.bias is None else torch.cat([new.weight, new.bias[:, None]], 1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)
    outputs = X_TI @ weight.T
    plain = torch.zeros_like(weight)
    plain[:, columns] = weight[:, columns]
    fitted = torch.zeros_like(weight)
    fitted[:, columns] = expected
    for changed, error in ((fitted, part.error), (plain, part.error_before_fit)):
        lost = (X_TI @ changed.T - outputs).square().sum() / outputs.square().sum()
        assert error == pytest.approx(float(lost), rel=1e-3)
    assert part.error < part.error_before_fit


def test_units_go_greedily_by_what_the_others_cannot_make_up_for():
    generator = torch.Generator().manual_seed(0)
    X_TI = torch.randn(50, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight, gram = torch.randn(5, 12, generator=generator), X_TI.T @ X_TI
    damped = (gram + 0.1 * gram.diagonal().diag()).double()

    def error(units: list[int]) -> float:
        columns = [2 * u + i for u in units for i in range(2)]
        change = weight.double() - fit_columns(weight, gram, columns, 0.1).double()
        return float(((change @ damped) * change).sum())

    left = list(range(6))
    while len(left) > 3:
        left.remove(min(left, key=lambda u: error([x for x in left if x != u])))
    assert keep_units(weight, gram, 6, 2, 3, 0.1).units == left
    power = (weight.square().sum(0) * gram.diagonal()).reshape(6, 2).sum(1)
    wanda = keep_units(weight, gram, 6, 2, 3, 0.1, "wanda").units
    assert wanda == sorted(power.argsort(descending=True)[:3].tolist())
    size = weight.square().sum(0).reshape(6, 2).sum(1)
    written = torch.tensor([9.0, 0, 0, 0, 0, 9.0])
    by_size = keep_units(weight, gram, 6, 2, 3, 0.1, "magnitude", written_U=written).units
    assert by_size == sorted((size + written).argsort(descending=True)[:3].tolist())
    halves = keep_units(weight, gram, 6, 2, 4, 0.1, groups=2).units
    assert [sum(u < 3 for u in halves), sum(u >= 3 for u in halves)] == [2, 2]


@pytest.mark.parametrize(
    ("heads", "groups", "config"), [(2, None, (2, 2)), (2, 1, (2, 1)), (None, 1, (2, 1))]
)
def test_heads_and_groups_that_are_asked_for(heads, groups, config, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "qwen2")
    record = shrink(
        dense, tmp_path / "small", heads=heads, kv_heads=groups, calibration=token_ids()
    )
    small = loaded(tmp_path / "small").config
    assert (small.num_attention_heads, small.num_key_value_heads) == config
    assert small.head_dim == 8
    kept = record.blocks[0].width.heads.kept
    of_group = [sum(head // 2 == group for head in kept) for group in range(2)]
    assert sorted(of_group) == ([1, 1] if config == (2, 2) else [0, 2])


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=3)
    options: dict[str, Any] = {"width": 0.25, "blocks": 2, "calibration": token_ids(), "batch": 2}
    shrink(dense, tmp_path / "whole", **options)
    shrunk_with_a_kill(dense, tmp_path / "killed", 1, **options)
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "killed")


@pytest.mark.parametrize(
    ("family", "options", "kind", "said"),
    [
        ("llama", {"heads": 3}, ValueError, "Possible are .*: 4 with 2, 2 with 2, 2 with 1, 1"),
        ("llama", {"kv_heads": 3}, ValueError, "--kv-heads 3 does not fit"),
        ("llama", {"width": 1.0}, ValueError, r"a share to remove in \(0, 1\); got 1"),
        ("llama", {"width": 0.001}, ValueError, "less than one step"),
        (
            "olmo2",
            {"width": 0.5},
            NotImplementedError,
            "normalises all heads.*--width 0.5 --heads 4",
        ),
        ("gpt2", {"width": 0.5}, NotImplementedError, "no width of a head.*--width 0.5 --heads 4"),
        ("gpt2", {"heads": 2}, NotImplementedError, "fewer heads would be wider ones$"),
        ("bloom", {"width": 0.5}, NotImplementedError, "no number for the channels of its MLPs"),
        ("bloom", {"width": 0.5, "heads": 4}, NotImplementedError, "no number for the channels"),
        ("llama", {"heads": 4}, ValueError, "all of them would stay: give --width as well"),
    ],
)
def test_what_cannot_be_ends_before_any_work(family, options, kind, said, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", family)
    with pytest.raises(kind, match=said):
        shrink(dense, tmp_path / "small", calibration=token_ids(), **options)
    assert not (tmp_path / "small").exists()
