"""Masks: exact counts and the right weights, for all groups and with tied scores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from processors import processor_threads
from prunus.hardware.numerics import count_zeros
from prunus.methods import patterns
from prunus.methods.patterns import Pattern, check_shape, keep_above_threshold, keep_mask
from refusals import assert_refused

GROUPS = st.sampled_from(["row", "layer", "column", 1, 2, 3, 100])
SPARSITIES = st.one_of(st.just(0.0), st.floats(0, 0.999))
SIZES = st.integers(1, 12)


def scores(rows: int, columns: int, seed: int, levels: int) -> Tensor:
    """Random scores of a few levels, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(levels, (rows, columns), generator=generator).float()


def distinct_scores(rows: int, columns: int, seed: int) -> Tensor:
    return (
        torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))
        .float()
        .view(rows, columns)
    )


@given(SIZES, SIZES, GROUPS, SPARSITIES, st.integers(0, 99), st.sampled_from([1, 2, 5, 10**6]))
@settings(deadline=None)
def test_unstructured_masks_equal_the_reference(rows, columns, group, sparsity, seed, levels):
    score_OI = scores(rows, columns, seed, levels) - (seed % 2)
    pattern = Pattern(group=group)
    kept = keep_mask(score_OI, pattern, sparsity)
    assert torch.equal(kept, reference.keep_mask(score_OI, pattern, sparsity))
    for places in reference.competitors((rows, columns), pattern):
        assert sum(not kept[place] for place in places) == int(len(places) * sparsity)


@given(SIZES, SIZES, st.data(), st.integers(0, 99), st.sampled_from([1, 3, 10**6]))
@settings(deadline=None)
def test_n_of_m_holds_for_all_n_and_m(rows, groups, data, seed, levels):
    m = data.draw(st.integers(1, 20))
    n = data.draw(st.integers(0, m))
    kept = keep_mask(scores(rows, groups * m, seed, levels), Pattern(n, m), 0.3)
    assert (kept.view(rows, groups, m).sum(dim=2) == n).all()
    # Negative scores are ordered too.
    score_OI = distinct_scores(rows, groups * m, seed) - rows * groups * m / 2
    assert torch.equal(
        keep_mask(score_OI, Pattern(n, m), 0.3), reference.keep_mask(score_OI, Pattern(n, m), 0.3)
    )


@pytest.mark.parametrize(
    "pattern", [Pattern(), Pattern(2, 4), Pattern(group="column"), Pattern(group=3)], ids=repr
)
@pytest.mark.parametrize("at_a_time", [1, 64, 1000])
def test_blocks_and_threads_change_nothing(monkeypatch, pattern, at_a_time):
    score_OI = scores(50, 64, 0, 20)
    expected = keep_mask(score_OI, pattern, 0.6)
    monkeypatch.setattr(patterns, "_SCORES_AT_A_TIME", at_a_time)
    with processor_threads(3):
        assert torch.equal(keep_mask(score_OI, pattern, 0.6), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(3, 4), Pattern(group="layer")], ids=repr)
def test_any_float_dtype_and_layout(dtype, pattern):
    score_OI = distinct_scores(8, 16, 0)
    expected = keep_mask(score_OI, pattern, 0.5)
    assert torch.equal(keep_mask(score_OI.to(dtype), pattern, 0.5), expected)
    assert torch.equal(keep_mask(score_OI.T.contiguous().T, pattern, 0.5), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_zeros_are_counted_with_either_sign(dtype):
    values = [[0.0, -0.0, 1.0], [float("nan"), float("inf"), 0.0]]
    assert count_zeros(torch.tensor(values, dtype=dtype)) == 3
    assert count_zeros(torch.empty(0, 4, dtype=dtype)) == 0


def test_an_infinite_score_is_removed_last():
    score_OI = torch.tensor([[float("inf"), 1.0, float("inf"), 0.0]])
    assert keep_mask(score_OI, Pattern(), 0.5).tolist() == [[True, False, True, False]]
    assert keep_mask(score_OI, Pattern(), 0.75).tolist() == [[False, False, True, False]]


def test_a_threshold_removes_all_equal_scores():
    score_OI = torch.arange(1000.0).view(20, 50)
    score_OI[score_OI == 502] = 500
    score_OI[score_OI == 501] = 500
    kept = keep_above_threshold(score_OI, 0.5)
    assert torch.equal(kept, score_OI > 500)
    assert (~kept).sum() == 503
    assert torch.equal(keep_above_threshold(score_OI, 0.25), score_OI > 250)
    assert keep_above_threshold(score_OI, 0.0).all()


def test_a_threshold_on_coarse_scores_counts_exactly():
    score_OI = scores(20, 50, 0, 3)
    kept = keep_above_threshold(score_OI, 0.5)
    assert (~kept).sum() == 500
    assert score_OI[kept].min() >= score_OI[~kept].max()
    assert keep_above_threshold(torch.zeros(4, 4), 0.25).sum() == 12


@given(st.integers(0, 64), st.integers(1, 64))
def test_n_of_m_removes_nothing_if_both_are_equal(n, m):
    if n > m:
        assert_refused(ValueError, "impossible", Pattern, n, m)
    else:
        assert Pattern(n, m).removes_nothing(0.5) == (n == m)


def test_unstructured_patterns():
    assert Pattern().removes_nothing(0.0)
    assert not Pattern().removes_nothing(0.1)


def test_what_is_no_pattern_or_group_is_refused():
    for group in ("rows", "", "0", "-1", 0, -3, True, 2.5):
        assert_refused(ValueError, r"group .* is unknown", Pattern, group=group)
    assert_refused(ValueError, "impossible", Pattern, 0, 0)
    assert_refused(ValueError, "both numbers", Pattern, n=2)


def test_a_pattern_that_does_not_fit_is_named_before_any_work():
    check_shape(Pattern(2, 4), (3, 8), "q_proj")
    check_shape(Pattern(), (3, 7), "q_proj")
    with pytest.raises(ValueError, match=r"q_proj has 10 inputs.*multiple of 4.*2:4"):
        check_shape(Pattern(2, 4), (3, 10), "q_proj")
    with pytest.raises(ValueError, match="conv has the shape"):
        check_shape(Pattern(), (3, 10, 3), "conv")  # type: ignore[arg-type]
    assert_refused(ValueError, "multiple of 4", keep_mask, torch.ones(3, 10), Pattern(2, 4), 0.5)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 50, float("nan")])
def test_a_sparsity_out_of_range_is_refused(sparsity):
    assert_refused(ValueError, "sparsity", keep_mask, torch.ones(3, 10), Pattern(), sparsity)
    assert_refused(ValueError, "sparsity", keep_above_threshold, torch.ones(3, 10), sparsity)
