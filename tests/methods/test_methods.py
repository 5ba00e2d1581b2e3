"""Each method against a slow reference, and its guarantees on degenerate matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from method_cases import BY_BLOCKS, PATTERNS, example, gather, prune, weird_example
from prunus.methods import METHODS
from prunus.methods.patterns import Pattern
from prunus.methods.solvers.obs import inverse_factor

# --- against the references ---


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_magnitude_and_wanda_equal_the_reference(pattern):
    weight_OI, X_TI = example(7, 12)
    pruned = prune("magnitude", weight_OI, X_TI, pattern)
    assert torch.equal(pruned.keep_OI, reference.block_keep(weight_OI.abs(), pattern, 0.5))
    pruned = prune("wanda", weight_OI, X_TI, pattern)
    assert torch.equal(
        pruned.keep_OI, reference.keep_mask(reference.wanda_score(weight_OI, X_TI), pattern, 0.5)
    )


@pytest.mark.parametrize("sparsity", [0.02, 0.5, 0.97])
def test_the_variant_removes_the_same_share_of_every_row(sparsity):
    weight_OI, X_TI = example(20, 200)
    weight_OI *= torch.linspace(0.1, 3, 200) ** torch.randn(20, 1)
    pruned = prune("wanda-variant", weight_OI, X_TI, Pattern(), sparsity)
    expected = reference.variant_keep(reference.wanda_score(weight_OI, X_TI), pruned.notes["alpha"])
    # A sum in float32 may fall on the other side of α.
    assert (pruned.keep_OI == expected).float().mean() > 0.999
    assert (~pruned.keep_OI).float().mean().item() == pytest.approx(sparsity, abs=0.0011)
    assert len({int(count) for count in pruned.keep_OI.sum(dim=1)}) > 1


@pytest.mark.parametrize("pattern", [*BY_BLOCKS, Pattern(5, 6), Pattern(9, 20)], ids=repr)
@pytest.mark.parametrize("block", [1, 7, 20, 128])
def test_sparsegpt_equals_the_reference(pattern, block):
    weight_OI, X_TI = example(6, 60)
    X_TI[:, 13] = 0
    pruned = prune("sparsegpt", weight_OI, X_TI, pattern, block=block)
    gram_II = X_TI.double().T @ X_TI.double()
    weight, keep = reference.sparsegpt(weight_OI, gram_II, pattern, 0.5, block=block)
    assert torch.equal(pruned.keep_OI, keep)
    assert torch.equal(pruned.weight_OI[:, 13], torch.zeros(6))
    torch.testing.assert_close(pruned.weight_OI.double(), weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", BY_BLOCKS, ids=repr)
@pytest.mark.parametrize("mask_from", ["wanda", "magnitude"])
@pytest.mark.parametrize("mask_order", ["before", "blockwise"])
def test_the_ablations_equal_the_reference(pattern, mask_from, mask_order):
    weight_OI, X_TI = example(6, 60)
    norms_I = (
        X_TI.double().norm(dim=0) if mask_from == "wanda" else torch.ones(60, dtype=torch.float64)
    )
    draw = reference.block_keep if mask_from == "magnitude" else reference.keep_mask
    fixed_OI = draw(weight_OI.abs() * norms_I, pattern, 0.5)

    def choose(weight_OB: Tensor, cost_B: Tensor, start: int) -> Tensor:
        columns = slice(start, start + len(cost_B))
        if mask_order == "before":
            return fixed_OI[:, columns]
        return reference.block_keep(weight_OB.abs() * norms_I[columns], pattern, 0.5)

    pruned = prune(
        "obs", weight_OI, X_TI, pattern, mask_from=mask_from, mask_order=mask_order, block=20
    )
    weight, keep = reference.obs_sweep(
        weight_OI, gather(X_TI).gram_II, 0.01, pattern.m or 20, choose
    )
    assert torch.equal(pruned.keep_OI, keep)
    torch.testing.assert_close(pruned.weight_OI.double(), weight, rtol=1e-3, atol=1e-3)


# --- guarantees ---


@given(
    st.sampled_from(["sparsegpt", "obs"]),
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(1, 7),
    st.data(),
)
@settings(deadline=None, max_examples=40)
def test_n_of_m_holds_for_every_block_width(name, m, groups, rows, data):
    n, block = data.draw(st.integers(0, m)), data.draw(st.integers(1, 50))
    order = data.draw(st.sampled_from(["before", "blockwise"]))
    weight_OI, X_TI = example(rows, groups * m)
    pruned = prune(name, weight_OI, X_TI, Pattern(n, m), block=block, mask_order=order)
    assert (pruned.keep_OI.view(rows, groups, m).sum(dim=2) == n).all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(4, 4)], ids=repr)
def test_nothing_to_remove_changes_nothing(name, pattern):
    weight_OI, X_TI = example(5, 12)
    weight_OI[2, 3], weight_OI[3, 3] = 0.0, -0.0
    X_TI[:, 1] = 0
    if name != "wanda-variant" or pattern.is_unstructured:
        pruned = prune(name, weight_OI, X_TI, pattern, 0.0)
        assert pruned.keep_OI.all()
        assert torch.equal(pruned.weight_OI.view(torch.int32), weight_OI.view(torch.int32))


# --- damping ---


def test_damping_that_is_enough_is_not_raised():
    _, X_TI = example(1, 30)
    factor_II, notes = inverse_factor(gather(X_TI).gram_II, 0.01)
    assert notes == {"damping": 0.01}
    scaled_II = X_TI.double().T @ X_TI.double()
    scaled_II /= scaled_II.diagonal().mean()
    expected = torch.linalg.cholesky(torch.linalg.inv(scaled_II + 0.01 * torch.eye(30)), upper=True)
    torch.testing.assert_close(factor_II.double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(factor_II, factor_II.triu())


def test_damping_is_raised_until_the_gram_can_be_inverted():
    _, X_TI = weird_example("duplicates", 1, 30, 0)
    factor_II, notes = inverse_factor(gather(X_TI).gram_II, 0.0)
    assert notes == {"damping": 0.01}
    assert factor_II.isfinite().all()

    indefinite_II = torch.tensor([[1.0, 1.05], [1.05, 1.0]])  # eigenvalues 2.05 and -0.05
    factor_II, notes = inverse_factor(indefinite_II, 0.01)
    assert notes == {"damping": 0.1}
    with pytest.raises(ValueError, match="cannot be inverted"):
        inverse_factor(torch.full((3, 3), float("nan")), 0.01)
    torch.testing.assert_close(
        factor_II.T @ factor_II, torch.linalg.inv(indefinite_II + 0.1 * torch.eye(2))
    )


def test_float64_is_tried_before_more_damping():
    gram_II = torch.eye(3)
    gram_II[0, 1] = gram_II[1, 0] = 1 - 2**-22
    factor_II, notes = inverse_factor(gram_II, 0.0)
    assert notes == {"damping": 0.0, "factored_in": "float64"}
    torch.testing.assert_close(
        factor_II.double(),
        torch.linalg.cholesky(torch.linalg.inv(gram_II.double()), upper=True),
        rtol=1e-6,
        atol=1e-6,
    )


def test_the_scale_of_the_inputs_does_not_matter():
    weight_OI, X_TI = example(6, 40)
    expected = prune("sparsegpt", weight_OI, X_TI, Pattern(group="layer"))
    for factor in (2.0**-30, 2.0**20):
        assert torch.equal(
            prune("sparsegpt", weight_OI, X_TI * factor, Pattern(group="layer")).weight_OI,
            expected.weight_OI,
        )
