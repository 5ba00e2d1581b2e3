"""How the loss depends on the outputs of linears: as autograd through the whole model has it.

Shape suffixes: O outputs, I inputs, T tokens, V words of the vocabulary.
"""

import contextlib

import pytest
import torch

from method_cases import gather
from prunus.engine.linear_plan import LinearPlan
from prunus.engine.run_options import RunOptions
from prunus.model.linears import Linear
from prunus.model.skeleton import Skeleton
from prunus.model.stream import Stream
from prunus.pruning.prune import Pruning
from prunus.pruning.recipe import Recipe
from prunus.rounding import loss_sensitivity
from prunus.rounding.group_sweep import relative_steps
from prunus.rounding.loss_sensitivity import (
    LinearSensitivity,
    LossMeasurement,
    _Sums,
    loss_sensitivities,
)
from sensitivity_cases import IDS, whole_model
from tiny import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("exact_products")


def planned(folder, dtype: str = "float32", **options) -> LinearPlan:
    recipe = Recipe(samples=4, seqlen=16, batch=2, dtype=dtype, **options)
    return Pruning(folder, None, recipe, RunOptions(calibration_data=IDS)).plan()


def streamed(
    plan: LinearPlan,
    seed: int = 0,
    feedback: bool = True,
    outside: bool = False,
    by_inputs: bool = False,
) -> dict[str, LinearSensitivity]:
    stream = Stream(plan.skeleton, plan.source, plan.device)
    with torch.no_grad(), contextlib.closing(stream):
        stream.embed([IDS], None)
        damping = plan.work.options.damping
        measurement = LossMeasurement(plan.selected, damping, seed, feedback, outside, by_inputs)
        return loss_sensitivities(stream, IDS, measurement)


def check_equal(found: LinearSensitivity, expected, options) -> None:
    _, squares_O, X_TI = expected
    # A tenth of the mean is added to every row.
    loss_O = squares_O + 0.1 * squares_O.mean()
    torch.testing.assert_close(found.loss_O, loss_O, rtol=1e-3, atol=0)
    steps_I = relative_steps(gather(X_TI), options.damping)
    expected_I = X_TI.square().mean() / steps_I.square()
    torch.testing.assert_close(found.importance_I, expected_I, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("family", "by_inputs"), [("llama", False), ("llama", True), ("gemma3_text", True)]
)
def test_it_is_what_autograd_through_the_whole_model_finds(family, by_inputs, tmp_path):
    folder = tiny_checkpoint(tmp_path / "dense", family)
    plan, expected = planned(folder), whole_model(folder, 0, by_inputs)
    found = streamed(plan, by_inputs=by_inputs)
    assert len(found) == 14 and found.keys() == {x for x in expected if ".layers." in x}
    for name, each in found.items():
        check_equal(each, expected[name], plan.work.options)


def test_by_inputs_it_says_what_independent_errors_of_all_weights_cost():
    # One token has large gradients and small inputs, as the first one of a window in Gemma.
    sizes_T1 = torch.ones(12, 1).index_fill_(0, torch.tensor(3), 100)
    X_TI, gradient_TO = torch.randn(12, 8) / sizes_T1, torch.randn(12, 4) * sizes_T1
    cost_NT = (torch.randn(4000, 4, 8) @ X_TI.T * gradient_TO.T).square().sum(dim=1)
    linear = Linear("q_proj", torch.nn.Linear(8, 4, bias=False))
    for by_inputs in (True, False):
        sums = _Sums(linear, 0, X_TI.device, 1.0, by_inputs)
        sums.add(X_TI, output_TO := linear.module(X_TI))
        output_TO.backward(gradient_TO)
        found = sums.without_weight(len(X_TI))
        # A tenth of the mean is added to every row.
        ratio = float(found.loss_O.sum() / 1.1 * found.importance_I.sum() / cost_NT.mean())
        assert ratio == pytest.approx(1, rel=0.05) if by_inputs else ratio > 10


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gemma3_text", True)])
def test_embedding_and_head_are_measured_each_for_its_own_part(family, tied, tmp_path):
    folder = tiny_checkpoint(tmp_path / "dense", family, tie_word_embeddings=tied)
    expected = whole_model(folder)
    found, corrected = (streamed(planned(folder), 0, x, outside=True) for x in (False, True))
    _, squares_V, X_TI = expected["lm_head"]
    torch.testing.assert_close(
        found["lm_head"].loss_O, squares_V + 0.1 * squares_V.mean(), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(
        found["lm_head"].importance_I, X_TI.square().mean(dim=0), rtol=1e-3, atol=0
    )
    # Where later columns correct the errors of those before them.
    expected_I = X_TI.square().mean() / relative_steps(gather(X_TI), None).square()
    torch.testing.assert_close(corrected["lm_head"].importance_I, expected_I, rtol=1e-2, atol=0)
    embedding = found["model.embed_tokens"]
    weight_VI, squares_I, ids_T = expected["model.embed_tokens"]
    shares_V = ids_T.bincount(minlength=len(weight_VI)) / len(ids_T)
    torch.testing.assert_close(embedding.loss_O, shares_V + 0.1 * shares_V.mean())
    # Gemma multiplies the rows by the root of their width.
    squares_I *= weight_VI.shape[1] if family == "gemma3_text" else 1
    torch.testing.assert_close(embedding.importance_I, squares_I, rtol=1e-2, atol=0)


def test_the_curve_is_the_loss_of_what_wanda_removes(tmp_path):
    folder = tiny_checkpoint(tmp_path / "dense", "llama")
    found = streamed(planned(folder), feedback=False)
    expected = whole_model(folder)
    for name in found:
        weight_OI, squares_O, X_TI = expected[name]
        loss_O = squares_O + 0.1 * squares_O.mean()
        energy_OI = weight_OI.square() * X_TI.square().mean(dim=0)
        assert len(found[name].curve_P) == 40
        for place in (0, 10, 20, 39):
            lost_OI = energy_OI.sort(dim=1).values[:, : int(weight_OI.shape[1] * place / 40)]
            torch.testing.assert_close(
                found[name].curve_P[place], loss_O @ lost_OI.sum(dim=1), rtol=1e-3, atol=0
            )


def test_gradients_go_back_through_experts(tmp_path):
    """In memory experts are fused, so the linears around them are compared."""
    folder = tiny_checkpoint(tmp_path / "dense", "qwen3_moe", moe_intermediate_size=32)
    plan, expected = planned(folder), whole_model(folder)
    found = streamed(plan)
    attention = [name for name in found if "self_attn" in name]
    experts = [each.loss_O for name, each in found.items() if ".experts." in name]
    assert (len(attention), len(experts)) == (8, 2 * 8 * 3)
    assert all((loss_O > 0).all() and loss_O.isfinite().all() for loss_O in experts)
    for name in attention:
        check_equal(found[name], expected[name], plan.work.options)


def test_only_chosen_linears_are_measured_and_the_seed_counts(tmp_path):
    folder = tiny_checkpoint(tmp_path / "dense", "llama")
    plan = planned(folder, only=("*.0.mlp.*",))
    one, again, other = streamed(plan), streamed(plan), streamed(plan, seed=1)
    assert sorted(name.rpartition(".")[2] for name in one) == ["down_proj", "gate_proj", "up_proj"]
    for name, each in one.items():
        assert torch.equal(each.loss_O, again[name].loss_O)
        assert not torch.equal(each.loss_O, other[name].loss_O)


def test_one_block_is_in_memory_at_a_time(tmp_path, monkeypatch):
    plan = planned(tiny_checkpoint(tmp_path / "dense", "llama", num_hidden_layers=3))
    filled, original = [], Skeleton.fill

    def fill(skeleton, index, values, device):
        block = original(skeleton, index, values, device)
        filled.append(index)
        for other in set(range(3)) - {index}:
            assert all(p.is_meta for p in skeleton.blocks[other].parameters()), (index, other)
        return block

    monkeypatch.setattr(Skeleton, "fill", fill)
    streamed(plan)
    assert filled == [0, 1, 2, 2, 1, 0]
    assert all(p.is_meta for block in plan.skeleton.blocks for p in block.parameters())


def test_float16_gradients_do_not_vanish(tmp_path):
    folder = tiny_checkpoint(tmp_path / "dense", "llama", torch.float16)
    half, single = streamed(planned(folder, "float16")), streamed(planned(folder))
    for name, each in half.items():
        error_O = each.loss_O - single[name].loss_O
        assert float(error_O.norm() / single[name].loss_O.norm()) < 0.1, name


def test_gradients_beyond_the_range_of_float16_are_measured_with_a_smaller_factor(
    tmp_path, monkeypatch
):
    folder = tiny_checkpoint(tmp_path / "dense", "llama", torch.float16)
    small = streamed(planned(folder, "float16"))
    monkeypatch.setattr(
        loss_sensitivity, "_FLOAT16_FACTORS", (2.0**40, *loss_sensitivity._FLOAT16_FACTORS)
    )
    for name, sensitivity in streamed(planned(folder, "float16")).items():
        assert torch.equal(sensitivity.loss_O, small[name].loss_O)


def test_gradients_that_are_not_finite_name_the_linear(tmp_path, monkeypatch):
    plan = planned(tiny_checkpoint(tmp_path / "dense", "llama"))
    original = loss_sensitivity._gradient_of_loss

    def endless(*arguments):
        gradient, sums = original(*arguments)
        return gradient * float("inf"), sums

    monkeypatch.setattr(loss_sensitivity, "_gradient_of_loss", endless)
    with pytest.raises(ValueError, match=r"gradients of model\.layers\.1\..* are not finite"):
        streamed(plan)
