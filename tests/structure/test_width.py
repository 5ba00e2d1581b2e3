"""Removed channels and heads: what is cut, what is chosen, and how the rest is fitted."""

from typing import Any

import pytest
import torch
from torch import Tensor

from prunus.methods import structured
from prunus.methods.solvers.least_squares import ridge
from prunus.methods.structured import Reader
from structure_cases import assert_same_logits, loaded, logits, take_fitted_columns
from structure_cases import shrink_without_repair as shrink
from tiny import tiny_checkpoint, token_ids

IDS = token_ids()
_NAMES = """
bamba cohere gemma3_text gemma4_text glm jamba lfm2 llama nemotron olmo phi phi3 qwen2 qwen3_5_text
starcoder2
"""
#: Families whose heads cannot become fewer.
_CHANNELS_ALONE = "falcon gpt2 gpt_neo gpt_neox olmo2 opt stablelm"
FAMILIES = {name: {"width": 0.5} for name in _NAMES.split()}
FAMILIES |= {name: {"width": 0.5, "heads": 4} for name in _CHANNELS_ALONE.split()}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_result_is_the_old_model_with_fitted_columns_and_zeros_for_the_others(family, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", family)
    record = shrink(dense, tmp_path / "small", calibration=IDS, batch=2, **FAMILIES[family])
    model, small = loaded(dense), loaded(tmp_path / "small")
    before = logits(model, IDS)
    assert take_fitted_columns(model, small, record) >= 2
    assert_same_logits(logits(small, IDS), logits(model, IDS), before)
    small.generate(IDS[:1, :4], max_new_tokens=2, do_sample=False)


def inputs_of(model: Any, name: str) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _m, args: seen.append(args[0])
    )
    logits(model, IDS)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).double()


def test_a_data_limited_linear_gets_the_same_channels_and_fit_in_float32(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    X_TI = torch.randn(100, 200, generator=generator) * torch.rand(200, generator=generator)
    weight, gram = torch.randn(20, 200, generator=generator), X_TI.T @ X_TI
    found = []
    for limited in (True, False):
        monkeypatch.setattr(structured, "is_data_limited", lambda *_, is_=limited: is_)
        reader = Reader(weight, gram, 1.0)
        channels = reader.keep(200, 1, 120)
        found.append((channels, reader.fit(channels)))
    (limited, fit), (exact, exact_fit) = found
    assert limited == exact
    torch.testing.assert_close(fit, exact_fit, rtol=1e-4, atol=1e-5)
    assert not torch.equal(fit, exact_fit)


@pytest.mark.parametrize("family", ["llama", "starcoder2"])
def test_the_columns_that_stay_are_the_least_squares_fit(family, tmp_path):
    """Against ordinary least squares with a ridge, with a column of ones where there is a bias."""
    dense = tiny_checkpoint(tmp_path / "dense", family)
    record = shrink(dense, tmp_path / "small", heads=2, calibration=IDS)
    name = "model.layers.0.self_attn.o_proj"
    X_TI = inputs_of(loaded(dense), name)
    old, new = loaded(dense).get_submodule(name), loaded(tmp_path / "small").get_submodule(name)
    part = record.blocks[0].width["heads"]
    columns = [8 * head + i for head in part.kept for i in range(8)]
    weight = old.weight.double()
    if old.bias is not None:
        X_TI = torch.cat([X_TI, torch.ones(len(X_TI), 1)], 1)
        weight = torch.cat([weight, old.bias.double()[:, None]], 1)
        columns = [*columns, 32]
    gram = X_TI.T @ X_TI
    # The ridge pulls towards the trained weights, so it is on both sides of the equation.
    damped = gram + ridge(32, len(X_TI)) * gram.diagonal().diag()
    expected = (weight @ damped[:, columns]) @ torch.linalg.inv(damped[columns][:, columns])
    found = new.weight if old.bias is None else torch.cat([new.weight, new.bias[:, None]], 1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)
    outputs = X_TI @ weight.T
    plain, fitted = torch.zeros_like(weight), torch.zeros_like(weight)
    plain[:, columns], fitted[:, columns] = weight[:, columns], expected
    for changed, error in ((fitted, part.error), (plain, part.error_before_fit)):
        lost = (X_TI @ changed.T - outputs).square().sum() / outputs.square().sum()
        assert error == pytest.approx(float(lost), rel=1e-3)
    assert part.error < part.error_before_fit


def test_the_units_that_the_others_reproduce_best_are_removed_one_by_one():
    generator = torch.Generator().manual_seed(0)
    X_TI = torch.randn(50, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight, gram = torch.randn(5, 12, generator=generator), X_TI.T @ X_TI
    damped = (gram + 0.1 * gram.diagonal().diag()).double()
    reader = Reader(weight, gram, 0.1)

    def error(units: list[int]) -> float:
        columns = [2 * u + i for u in units for i in range(2)]
        change = weight.double() - reader.fit(columns).double()
        return float(((change @ damped) * change).sum())

    left = list(range(6))
    while len(left) > 3:
        left.remove(min(left, key=lambda u: error([x for x in left if x != u])))
    assert reader.keep(6, 2, 3) == left
    halves = reader.keep(6, 2, 4, groups=2)
    assert [sum(u < 3 for u in halves), sum(u >= 3 for u in halves)] == [2, 2]


@pytest.mark.parametrize(
    ("heads", "groups", "config"), [(2, None, (2, 2)), (2, 1, (2, 1)), (None, 1, (2, 1))]
)
def test_heads_and_groups_that_are_asked_for(heads, groups, config, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "qwen2")
    record = shrink(dense, tmp_path / "small", heads=heads, kv_heads=groups, calibration=IDS)
    small = loaded(tmp_path / "small").config
    assert (small.num_attention_heads, small.num_key_value_heads, small.head_dim) == (*config, 8)
    kept = record.blocks[0].width["heads"].kept
    of_group = [sum(head // 2 == group for head in kept) for group in range(2)]
    assert sorted(of_group) == ([1, 1] if config == (2, 2) else [0, 2])
