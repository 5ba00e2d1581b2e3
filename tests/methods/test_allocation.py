"""Allocation: exact budgets, and the greedy search against all others."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prunus.methods.allocation import (
    allocate_by_error,
    allocate_by_outliers,
    round_to_whole_weights,
)


def mean(sparsities: list[float], weights: list[int]) -> float:
    return math.fsum(s * n for s, n in zip(sparsities, weights, strict=True)) / sum(weights)


# --- by error ---


def interpolated(curve: list[tuple[float, float]], at: float) -> float:
    for (x1, y1), (x2, y2) in itertools.pairwise(curve):
        if at <= x2 + 1e-12:
            return y1 + (y2 - y1) * (at - x1) / (x2 - x1)
    raise AssertionError(at)


@st.composite
def convex_curves(draw):
    curves, weights = [], []
    for _ in range(draw(st.integers(1, 3))):
        slopes = sorted(draw(st.lists(st.floats(0, 10), min_size=2, max_size=4)))
        points = [(0.0, 0.0)]
        for slope in slopes:
            points.append((points[-1][0] + 0.2, points[-1][1] + 0.2 * slope))
        curves.append(points)
        weights.append(draw(st.integers(1, 5)))
    return curves, weights


@given(convex_curves(), st.floats(0, 0.75))
@settings(deadline=None, max_examples=30)
def test_no_other_sparsities_of_the_same_budget_cost_less(drawn, sparsity):
    curves, weights = drawn
    reach = mean([curve[-1][0] for curve in curves], weights)
    assume(sparsity <= reach)
    found = allocate_by_error(curves, weights, sparsity)
    assert mean(found, weights) == pytest.approx(sparsity, abs=1e-12)
    cost = sum(interpolated(curve, s) for curve, s in zip(curves, found, strict=True))
    grid = [[i * curve[-1][0] / 20 for i in range(21)] for curve in curves[:-1]]
    for others in itertools.product(*grid):
        spent = sum(s * n for s, n in zip(others, weights[:-1], strict=True))
        last = (sparsity * sum(weights) - spent) / weights[-1]
        if 0 <= last <= curves[-1][-1][0]:
            trial = sum(interpolated(c, s) for c, s in zip(curves, [*others, last], strict=True))
            assert cost <= trial + 1e-9


def test_a_curve_that_is_not_convex_is_replaced_by_its_hull():
    """The first curve is steep up to 0.4 and flat after it, so stopping at 0.4 would be worst."""
    dented, straight = [(0.0, 0.0), (0.4, 8.0), (0.8, 8.1)], [(0.0, 0.0), (0.4, 4.5), (0.8, 9.0)]
    assert allocate_by_error([dented, straight], [10, 10], 0.4) == pytest.approx([0.8, 0.0])


# --- by outliers ---


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 9)), min_size=2, max_size=9),
    st.floats(0.2, 0.8),
    st.floats(0, 0.1),
)
@settings(deadline=None)
def test_sparsities_fall_with_the_outliers_over_the_whole_spread(layers, sparsity, spread):
    outliers, weights = (list(each) for each in zip(*layers, strict=True))
    assume(max(outliers) - min(outliers) > 1e-6)
    found = allocate_by_outliers(outliers, weights, sparsity, spread)
    assert mean(found, weights) == pytest.approx(sparsity)
    assert max(found) - min(found) == pytest.approx(2 * spread)
    # The places between the two ends are those of the outliers, in reverse.
    for value, share in zip(found, outliers, strict=True):
        place = (share - min(outliers)) / (max(outliers) - min(outliers))
        assert value == pytest.approx(max(found) - 2 * spread * place)


def test_layers_of_equal_size_have_the_sparsities_of_the_original_code():
    """Its steps, one by one: percentages, the spread 2λ from 0, and the mean density 1 - S."""
    percentages = torch.tensor([4.1, 2.9, 3.3, 3.0, 5.2], dtype=torch.float64)
    distance = percentages - percentages.min()
    kept = distance / (percentages.max() - percentages.min()) * (2 * 0.08)
    kept = kept - kept.mean() + (1 - 0.7)
    found = allocate_by_outliers((percentages / 100).tolist(), [7] * 5, 0.7)
    assert found == pytest.approx((1 - kept).tolist())


def test_layers_with_as_many_outliers_have_the_same_sparsity():
    assert allocate_by_outliers([0.25, 0.25], [1, 2], 0.5) == [0.5, 0.5]


# --- whole weights ---


@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.integers(1, 300), st.floats(0, 1)),
        min_size=1,
        max_size=9,
    ),
    st.floats(0, 0.9),
)
@settings(deadline=None)
def test_whole_weights_come_within_a_column_of_the_budget(layers, sparsity):
    shapes = [(rows, columns) for rows, columns, _ in layers]
    weights = [rows * columns for rows, columns in shapes]
    ends = max(0.0, sparsity - 0.3), min(0.95, sparsity + 0.3)
    curves = [[(ends[0], 0.0), (ends[1], value)] for *_, value in layers]
    wanted = allocate_by_error(curves, weights, sparsity)
    found = round_to_whole_weights(wanted, shapes, sparsity)
    removed = sum(rows * int(columns * s) for (rows, columns), s in zip(shapes, found, strict=True))
    budget = sparsity * sum(weights)
    assert removed <= budget + 1e-5
    for (rows, columns), before, after in zip(shapes, wanted, found, strict=True):
        assert 0 <= after < 1
        assert abs(int(columns * after) - columns * before) <= 1 + 1e-6
        # No linear is left that was not rounded up although one more column would have fitted.
        rounded_up = int(columns * after) > columns * before + 1e-6
        last = int(columns * after) + 1 == columns
        whole = abs(columns * before - round(columns * before)) < 1e-6
        assert rounded_up or last or whole or rows > budget - removed - 1e-5


def test_whole_numbers_of_weights_stay():
    assert round_to_whole_weights([0.5, 0.25], [(3, 8), (5, 4)], 17 / 44) == [0.5, 0.25]
    # 29/49·49 is a little less than 29 in floating point.
    (found,) = round_to_whole_weights([29 / 49], [(1, 49)], 29 / 49)
    assert int(49 * found) == 29
