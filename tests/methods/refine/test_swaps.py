"""Swaps against slow references, their guarantees for every input, and the composed methods."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from method_cases import PATTERNS, WEIRD, example, gather, weird_example
from prunus.methods import METHODS, MethodOptions, Work, compose
from prunus.methods.patterns import Pattern
from prunus.methods.refine import swaps
from prunus.methods.refine.swaps import refine_by_swaps

# Swaps stay within a row, so columns keep no count.
BY_ROWS = [*(pattern for pattern in PATTERNS if pattern.group != "column"), Pattern(5, 6)]


def start(weight_OI: Tensor, X_TI: Tensor, pattern: Pattern, sparsity: float = 0.5) -> Tensor:
    return METHODS["wanda"].prune(weight_OI, gather(X_TI), pattern, sparsity).keep_OI


def refine(weight_OI, keep_OI, statistics, pattern, damping=None):
    options = MethodOptions(refine="swaps", damping=damping)
    return refine_by_swaps(weight_OI, keep_OI, statistics, Work(pattern, options=options))


def error(weight_OI: Tensor, keep_OI: Tensor, X_TI: Tensor, damping: float) -> Tensor:
    """Squared output error per row, with the scaled and damped Gram matrix of the swaps."""
    scaled_OI, hessian_II, _ = reference.scaled(weight_OI, X_TI.double().T @ X_TI.double(), damping)
    return reference.squared_error(scaled_OI * ~keep_OI, hessian_II)


# --- guarantees ---


@given(
    st.sampled_from(BY_ROWS),
    st.sampled_from(WEIRD),
    st.integers(1, 7),
    st.sampled_from([0.0, 0.1, 0.5, 0.99]),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_counts_stay_and_no_argument_is_changed(pattern, kind, rows, sparsity, seed):
    weight_OI, X_TI = weird_example(kind, rows, 12, seed)
    keep_OI = start(weight_OI, X_TI, pattern, sparsity)
    statistics, before = gather(X_TI), gather(X_TI)
    given_OI, given_keep_OI = weight_OI.clone(), keep_OI.clone()
    refined_OI, notes = refine(weight_OI, keep_OI, statistics, pattern)
    assert torch.equal(weight_OI, given_OI)
    assert torch.equal(keep_OI, given_keep_OI)
    assert torch.equal(statistics.gram_II, before.gram_II)
    assert notes["swaps"] >= int((refined_OI & ~keep_OI).sum())
    width = pattern.m or 12
    assert torch.equal(
        refined_OI.view(rows, -1, width).sum(dim=2), keep_OI.view(rows, -1, width).sum(dim=2)
    )


# --- quality ---


@given(
    st.sampled_from(BY_ROWS),
    st.integers(1, 9),
    st.sampled_from([12, 60]),
    st.integers(1, 5),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_no_round_of_swaps_raises_the_error_of_a_row(pattern, rows, columns, rounds, seed):
    weight_OI, X_TI = example(rows, columns, seed)
    keep_OI = start(weight_OI, X_TI, pattern)
    with mock.patch.object(swaps, "_MAX_ROUNDS", rounds):
        refined_OI, notes = refine(weight_OI, keep_OI, gather(X_TI), pattern, 0.05)
    assert notes["rounds"] <= rounds
    before, after = (error(weight_OI, mask, X_TI, 0.05) for mask in (keep_OI, refined_OI))
    changed_O = (refined_OI != keep_OI).any(dim=1)
    assert (after[changed_O] < before[changed_O]).all()


@pytest.mark.parametrize("pattern", BY_ROWS, ids=repr)
def test_at_the_end_no_swap_lowers_the_error(pattern):
    """Try all swaps of all rows. A round has more candidates than the 24 features."""
    weight_OI, X_TI = example(15, 24)
    keep_OI = start(weight_OI, X_TI, pattern)
    refined_OI, notes = refine(weight_OI, keep_OI, gather(X_TI), pattern, 0.05)
    assert 0 < notes["rounds"] < 100
    assert not torch.equal(refined_OI, keep_OI)
    scaled_OI, hessian_II, _ = reference.scaled(weight_OI, X_TI.double().T @ X_TI.double(), 0.05)
    for weight_I, keep_I in zip(scaled_OI, refined_OI, strict=True):
        worth = 1e-4 * reference.squared_error((weight_I * ~keep_I)[None], hessian_II).item()
        changes = reference.swap_changes(weight_I, keep_I, hessian_II)
        allowed = {
            pair: change
            for pair, change in changes.items()
            if pattern.m is None or pair[0] // pattern.m == pair[1] // pattern.m
        }
        assert allowed
        assert min(allowed.values()) > -worth


def test_one_swap_is_the_best_of_all(monkeypatch):
    monkeypatch.setattr(swaps, "_PAIRS", 1)
    monkeypatch.setattr(swaps, "_MAX_ROUNDS", 1)
    for pattern in (Pattern(), Pattern(2, 4)):
        weight_OI, X_TI = example(4, 16)
        keep_OI = start(weight_OI, X_TI, pattern)
        refined_OI, _ = refine(weight_OI, keep_OI, gather(X_TI), pattern, 0.05)
        scaled_OI, hessian_II, _ = reference.scaled(
            weight_OI, X_TI.double().T @ X_TI.double(), 0.05
        )
        for weight_I, keep_I, refined_I in zip(scaled_OI, keep_OI, refined_OI, strict=True):
            changes = reference.swap_changes(weight_I, keep_I, hessian_II)
            if pattern.m is not None:
                changes = {pair: x for pair, x in changes.items() if pair[0] // 4 == pair[1] // 4}
            best = min(changes, key=changes.__getitem__)
            swapped = [
                (keep_I & ~refined_I).nonzero().flatten(),
                (refined_I & ~keep_I).nonzero().flatten(),
            ]
            assert [x.tolist() for x in swapped] == (
                [[x] for x in best] if changes[best] < 0 else [[], []]
            )


def test_rows_in_slices_give_the_same_result(monkeypatch):
    weight_OI, X_TI = example(40, 60)
    keep_OI = start(weight_OI, X_TI, Pattern())
    whole, notes = refine(weight_OI, keep_OI, gather(X_TI), Pattern(), 0.05)
    monkeypatch.setattr("prunus.methods.refine.swaps._ELEMENTS", 5000)
    sliced, again = refine(weight_OI, keep_OI, gather(X_TI), Pattern(), 0.05)
    assert notes == again
    assert torch.equal(whole, sliced)


# --- composition ---


@pytest.mark.parametrize("refinement", ["none", "swaps"])
@pytest.mark.parametrize("update", ["none", "least-squares"])
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(2, 4)], ids=repr)
def test_mask_then_refinement_then_update(refinement, update, pattern):
    weight_OI, X_TI = example(8, 24)
    options = MethodOptions(refine=refinement, weight_update=update, damping=0.02)
    pruned = compose(METHODS["wanda"], options).prune(
        weight_OI, gather(X_TI), pattern, 0.5, options
    )
    keep_OI = start(weight_OI, X_TI, pattern)
    if refinement != "none":
        keep_OI, _ = refine(weight_OI, keep_OI, gather(X_TI), pattern, 0.02)
    assert torch.equal(pruned.keep_OI, keep_OI)
    if update == "none":
        assert torch.equal(pruned.weight_OI, weight_OI * keep_OI)
    else:
        expected = reference.least_squares(weight_OI, keep_OI, gather(X_TI).gram_II, 0.02)
        torch.testing.assert_close(pruned.weight_OI.double(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(4, 4)], ids=repr)
def test_nothing_to_remove_changes_nothing(name, pattern):
    weight_OI, X_TI = example(5, 12)
    options = MethodOptions(refine="swaps", weight_update="least-squares")
    pruned = compose(METHODS[name], options).prune(weight_OI, gather(X_TI), pattern, 0.0, options)
    assert torch.equal(pruned.weight_OI.view(torch.int32), weight_OI.view(torch.int32))
