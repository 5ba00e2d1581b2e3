"""RIA, ALPS and least squares: against float64 references, and on degenerate inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from method_cases import PATTERNS, WEIRD, example, gather, prune, weird_example
from prunus.methods import METHODS, MethodOptions, compose
from prunus.methods.patterns import Pattern
from prunus.methods.solvers.least_squares import conjugate_gradients, fit_least_squares, ridge

# --- RIA ---


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_ria_equals_the_reference(pattern, power):
    weight_OI, X_TI = example(7, 12)
    pruned = prune("ria", weight_OI, X_TI, pattern, ria_power=power)
    expected = reference.keep_mask(reference.ria_score(weight_OI, X_TI, power), pattern, 0.5)
    assert torch.equal(pruned.keep_OI, expected)


# --- least squares ---


@pytest.mark.parametrize("damping", [0.01, 0.3, None])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_the_fit_is_the_exact_solution(pattern, damping, monkeypatch):
    monkeypatch.setattr("prunus.methods.solvers.least_squares._TOLERANCE", 1e-6)
    monkeypatch.setattr("prunus.methods.solvers.least_squares._MAX_STEPS", 200)
    weight_OI, X_TI = example(9, 24)
    X_TI[:, 7] = 0
    statistics = gather(X_TI)
    start = METHODS["wanda"].prune(weight_OI, statistics, pattern, 0.5)
    fitted = fit_least_squares(weight_OI, start, statistics, damping)
    used = damping or ridge(24, 200)
    assert fitted.notes["ridge"] == used
    expected = reference.least_squares(weight_OI, start.keep_OI, statistics.gram_II, used)
    torch.testing.assert_close(fitted.weight_OI.double(), expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(fitted.keep_OI, start.keep_OI)
    kept = start.keep_OI[:, 7]
    # A dead input keeps its weights.
    torch.testing.assert_close(fitted.weight_OI[kept, 7], weight_OI[kept, 7])


@given(
    st.integers(1, 8),
    st.integers(1, 30),
    st.integers(1, 60),
    st.integers(0, 40),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_no_step_of_conjugate_gradients_raises_the_error(rows, columns, tokens, steps, seed):
    weight_OI, X_TI = example(rows, columns, seed, tokens)
    keep_OI = torch.rand(rows, columns) < 0.5
    target_OI, hessian_II, _ = reference.scaled(weight_OI, gather(X_TI).gram_II, 0.05)
    start_OI = torch.randn(rows, columns)
    solution_OI, taken = conjugate_gradients(
        start_OI, target_OI.float(), keep_OI, hessian_II.float(), steps
    )
    before = reference.squared_error(start_OI * keep_OI - target_OI, hessian_II)
    after = reference.squared_error(solution_OI - target_OI, hessian_II)
    assert taken <= steps
    assert (after <= before * (1 + 1e-4) + 1e-6).all()
    assert not solution_OI[~keep_OI].any()


# --- ALPS ---


@pytest.mark.parametrize("iterations", [1, 4, 5, 32])
@pytest.mark.parametrize("pattern", [*PATTERNS, Pattern(4, 8)], ids=repr)
def test_alps_equals_the_reference(pattern, iterations):
    weight_OI, X_TI = example(6, 24)
    X_TI[:, 13] = 0
    pruned = prune("alps", weight_OI, X_TI, pattern, damping=0.1, iterations=iterations)
    gram_II = X_TI.double().T @ X_TI.double()
    weight, keep = reference.alps(weight_OI, gram_II, pattern, 0.5, 0.1, iterations)
    # The reference breaks ties of weights that are exactly 0 in its own order.
    alive_I = X_TI.any(dim=0)
    assert torch.equal(pruned.keep_OI[:, alive_I], keep[:, alive_I])
    # A few steps of conjugate gradients remove nearly all of the error that is left.
    _, hessian_II, scale_I = reference.scaled(weight_OI, gram_II, 0.1)
    alive_II = hessian_II[alive_I][:, alive_I]

    def loss(found_OI: torch.Tensor) -> float:
        change_OI = (found_OI.double() - weight_OI)[:, alive_I] * scale_I[alive_I]
        return float(reference.squared_error(change_OI, alive_II).sum())

    assert loss(weight) * (1 - 1e-6) <= loss(pruned.weight_OI) <= loss(weight) * 1.01
    if iterations == 32:
        torch.testing.assert_close(pruned.weight_OI.double(), weight, rtol=0.02, atol=0.05)


@given(
    st.sampled_from([*PATTERNS, Pattern(0, 4), Pattern(3, 4)]),
    st.integers(1, 9),
    st.sampled_from([0.1, 0.4, 0.8]),
    st.sampled_from(WEIRD),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_alps_keeps_exact_counts(pattern, rows, sparsity, kind, seed):
    weight_OI, X_TI = weird_example(kind, rows, 12, seed)
    pruned = prune("alps", weight_OI, X_TI, pattern, sparsity, iterations=5)
    for places in reference.competitors((rows, 12), pattern):
        gone = int(len(places) * sparsity) if pattern.n is None else pattern.m - pattern.n
        assert sum(not pruned.keep_OI[place] for place in places) == gone


@pytest.mark.parametrize(
    "pattern", [Pattern(), Pattern(group="layer"), Pattern(2, 4), Pattern(4, 8)], ids=repr
)
def test_wanda_loses_more_than_sparsegpt_and_sparsegpt_more_than_alps(pattern):
    """ALPS beats the best weights for Wanda's mask too, also on tokens that it has not seen."""
    weight_OI, X_TI = example(32, 96, tokens=600)
    errors = {}
    for update in ("none", "least-squares"):
        options = MethodOptions(weight_update=update)
        for name in ("wanda", "sparsegpt", "alps") if update == "none" else ("wanda",):
            method = compose(METHODS[name], options)
            pruned = method.prune(weight_OI, gather(X_TI[:300]), pattern, 0.5, options)
            change_OI = weight_OI - pruned.weight_OI
            errors[name, update] = [float((change_OI @ x.T).norm()) for x in X_TI.split(300)]
    (seen, alps_unseen), (fitted, *_) = errors["alps", "none"], errors["wanda", "least-squares"]
    assert errors["wanda", "none"][0] > errors["sparsegpt", "none"][0] > 1.05 * seen
    assert seen < 0.97 * fitted
    assert all(unseen >= alps_unseen for _, unseen in errors.values())


@given(
    st.sampled_from(["wanda", "ria", "sparsegpt", "alps"]),
    st.sampled_from(WEIRD),
    st.sampled_from([Pattern(), Pattern(2, 4)]),
    st.sampled_from([None, 0.0, 1e-6, 0.01, 1.0]),
    st.integers(1, 6),
    st.sampled_from([4, 8, 40]),
    st.integers(0, 20),
)
@settings(deadline=None, max_examples=40)
def test_no_input_makes_an_update_that_is_not_finite(
    name, kind, pattern, damping, rows, columns, seed
):
    weight_OI, X_TI = weird_example(kind, rows, columns, seed)
    options = MethodOptions.model_construct(weight_update="least-squares", damping=damping)
    before = METHODS[name].prune(weight_OI, gather(X_TI), pattern, 0.5, options)
    pruned = compose(METHODS[name], options).prune(weight_OI, gather(X_TI), pattern, 0.5, options)
    assert torch.equal(pruned.keep_OI, before.keep_OI)
    assert pruned.weight_OI.isfinite().all()
    assert not pruned.weight_OI[~pruned.keep_OI].any()
    # All zeros are +0. Packed checkpoints would keep a -0.
    assert torch.equal(
        pruned.weight_OI.view(torch.int32)[~pruned.keep_OI],
        torch.zeros_like(pruned.weight_OI[~pruned.keep_OI], dtype=torch.int32),
    )
