"""How a sparsity is allocated to layers, where a layer is a block or a single linear.

These are pure functions from a few numbers per layer to a sparsity per layer. Their mean, weighted
by the layers' numbers of weights, is the sparsity of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise


def allocate_by_error(
    curves: Sequence[Sequence[tuple[float, float]]], weights: Sequence[int], sparsity: float
) -> list[float]:
    """Remove weights where that adds least error per weight, until the budget is used up.

    Every curve is replaced by the lower convex hull of its points. On a hull the error per weight
    only rises with the sparsity, so the greedy choice is optimal: no other sparsities of the same
    weighted mean have a lower sum of (interpolated) errors.

    Args:
        curves: The points (sparsity, error) of each layer: two or more, finite, of rising sparsity.
            Errors of different layers are added up, so they must have the same unit.
        weights: The number of weights of each layer.
        sparsity: The sparsity of all layers together. It lies between the sparsity that the first
            points of all curves have together and that of their last points.

    Returns:
        The sparsity of each layer.

    >>> robust, fragile = [(0.0, 0.0), (0.5, 1.0)], [(0.0, 0.0), (0.5, 10.0)]
    >>> allocate_by_error([robust, fragile], [100, 100], 0.25)
    [0.5, 0.0]
    """
    segments = []
    for layer, curve in enumerate(curves):
        for (left, low), (right, high) in pairwise(_lower_hull(curve)):
            removed = (right - left) * weights[layer]
            segments.append(((high - low) / removed, layer, right, removed))
    result = [curve[0][0] for curve in curves]
    # Every curve starts at its first point. The segments get what is left of the budget.
    spent = math.fsum(s * n for s, n in zip(result, weights, strict=True))
    left_over = sparsity * sum(weights) - spent
    # Equal slopes are taken in the order of the layers. Slopes rise along a hull, so the sorted
    # order never skips a segment of a layer.
    for _, layer, right, removed in sorted(segments):
        if removed >= left_over:
            result[layer] += max(0.0, left_over) / weights[layer]
            break
        result[layer] = right
        left_over -= removed
    return result


def round_to_whole_weights(
    sparsities: Sequence[float], shapes: Sequence[tuple[int, int]], sparsity: float
) -> list[float]:
    """Sparsities that remove whole weights from every row, with nearly no loss in the total.

    A linear of `in` inputs loses `int(in * sparsity)` weights per row, so the fraction of a weight
    would be lost in every linear. Here the fractions are added up, and given to the linears that
    were nearest to the next whole weight. The total misses the budget by less than one column.

    Args:
        sparsities: The sparsity of each linear, in [0, 1).
        shapes: (out, in) of each linear.
        sparsity: The sparsity of all linears together.

    Returns:
        For each linear the smallest float s for which `int(in * s)` is the decided number.

    >>> round_to_whole_weights([0.45, 0.55], [(1, 10), (1, 10)], 0.5)
    [0.5, 0.5]
    """
    exact = [value * columns for value, (_, columns) in zip(sparsities, shapes, strict=True)]
    # A number that is whole except for rounding counts as whole.
    counts = [math.floor(value + 1e-9) for value in exact]
    budget = sparsity * sum(rows * columns for rows, columns in shapes) + 1e-6
    spare = budget - sum(rows * count for (rows, _), count in zip(shapes, counts, strict=True))
    # The linear with the largest lost fraction is first.
    for layer in sorted(range(len(shapes)), key=lambda at: counts[at] - exact[at]):
        rows, columns = shapes[layer]
        if rows <= spare and counts[layer] + 1 < columns:
            counts[layer] += 1
            spare -= rows
    result = []
    for count, (_, columns) in zip(counts, shapes, strict=True):
        # Division may round down, and int(columns * value) would then lose a weight.
        value = count / columns
        result.append(value if int(columns * value) == count else math.nextafter(value, 1))
    return result


def _lower_hull(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of the lower convex hull of a curve, from left to right."""
    hull: list[tuple[float, float]] = []
    for x, y in curve:
        # Remove the last point while it lies on or above the line past it.
        while len(hull) > 1:
            (x1, y1), (x2, y2) = hull[-2:]
            if (y2 - y1) * (x - x1) < (y - y1) * (x2 - x1):
                break
            hull.pop()
        hull.append((x, y))
    return hull
