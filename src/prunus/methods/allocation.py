"""How a sparsity is shared out among layers: blocks, or single linears.

Pure functions from a few numbers per layer to a sparsity per layer, whose mean, weighted by the layers' numbers of
weights, is the sparsity asked for. Nothing here knows a model; whoever calls says what the layers are.

uniform      the same for all
owl          layers with many outliers keep more (Yin et al. 2023, arXiv 2310.05175)
dlp          layers with a low median score keep more (Chen et al. 2025, arXiv 2505.23807)
arithmetic   rising evenly from the first to the last (Huang et al. 2025, arXiv 2502.14770)
allocate_by_error     spent where the error per removed weight is least

The published ones are rules of thumb about the network; `allocate_by_error` compares the layers' own errors. Scores are those of a
method, such as Wanda's |W_ij|·‖X_j‖₂. Shape suffixes: O outputs (rows), I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = [
    "allocate_by_error",
    "arithmetic",
    "dlp",
    "median_score",
    "meet_budget",
    "outlier_share",
    "owl",
    "removed_energy",
    "round_to_whole_weights",
    "uniform",
]

#: No layer loses more than this unless told otherwise: an empty layer cuts the network in two.
MOST = 0.95


def uniform(weights: Sequence[int], sparsity: float) -> list[float]:
    """The same sparsity for every layer."""
    return meet_budget([sparsity] * len(weights), weights, sparsity, most=max(MOST, sparsity))


def owl(
    outlier_shares: Sequence[float], weights: Sequence[int], sparsity: float, spread: float = 0.08
) -> list[float]:
    """Outlier-weighed: the share kept rises with the share of outliers, over a range of 2·`spread` in all.

    Args:
        outlier_shares: per layer, see `outlier_share`.
        weights: numbers of weights.
        sparsity: of all layers together.
        spread: half the distance between the densest and the sparsest layer, λ in the paper.

    Raises:
        ValueError: as `meet_budget`.
    """
    return meet_budget(_spread_out(outlier_shares, sparsity, spread), weights, sparsity)


def dlp(
    medians: Sequence[float], weights: Sequence[int], sparsity: float, spread: float = 0.15
) -> list[float]:
    """Dynamic layerwise: the share kept rises with 1 − median/Σ medians, over a range of 2·`spread` in all.

    Args:
        medians: of the scores of each layer, see `median_score`.
        weights: numbers of weights.
        sparsity: of all layers together.
        spread: half the distance between the densest and the sparsest layer, α in the paper.

    Raises:
        ValueError: as `meet_budget`.
    """
    total = sum(medians)
    importance = [1 - median / total if total > 0 else 0.0 for median in medians]
    return meet_budget(_spread_out(importance, sparsity, spread), weights, sparsity)


def arithmetic(weights: Sequence[int], sparsity: float, step: float) -> list[float]:
    """Layer l of L gets `sparsity` + `step`·(l − (L − 1)/2): every layer that much sparser than the one before.

    Raises:
        ValueError: as `meet_budget`.
    """
    middle = (len(weights) - 1) / 2
    return meet_budget(
        [sparsity + step * (place - middle) for place in range(len(weights))], weights, sparsity
    )


def allocate_by_error(
    curves: Sequence[Sequence[tuple[float, float]]], weights: Sequence[int], sparsity: float
) -> list[float]:
    """Remove weights where that costs least error per weight, until the budget is spent.

    A curve is taken for the lower convex hull of its points. On hulls the greedy choice is optimal: no other
    sparsities of the same weighted mean have a lower sum of (interpolated) errors.

    Args:
        curves: per layer, points (sparsity, error) of rising sparsity. Errors of different layers are added up, so they
            must be in the same unit.
        weights: numbers of weights.
        sparsity: of all layers together.

    Raises:
        ValueError: curves that do not reach the budget, have fewer than two points, or points that do not rise or are not
            finite; as `meet_budget` too.
    """
    _check(weights, sparsity)
    if len(curves) != len(weights):
        raise ValueError(f"there are {len(curves)} error curves for {len(weights)} layers")
    segments = []
    for layer, curve in enumerate(curves):
        hull = _lower_hull(curve, layer)
        for (left, low), (right, high) in pairwise(hull):
            removed = (right - left) * weights[layer]
            segments.append(((high - low) / removed, layer, right, removed))
    result = [curve[0][0] for curve in curves]
    budget = sparsity * sum(weights)
    left_over = budget - math.fsum(s * n for s, n in zip(result, weights, strict=True))
    reach = math.fsum(curve[-1][0] * n for curve, n in zip(curves, weights, strict=True))
    if left_over < -1e-9 * sum(weights) or budget > reach + 1e-9 * sum(weights):
        raise ValueError(
            f"the error curves go from a sparsity of {1 - (1 - (budget - left_over) / sum(weights)):.4f} to "
            f"{reach / sum(weights):.4f} in all; {sparsity} is not between them: measure more points"
        )
    # Equal slopes in the order of the layers. On a hull slopes rise, so no layer skips a segment of its own.
    for _, layer, right, removed in sorted(segments):
        if removed >= left_over:
            result[layer] += max(0.0, left_over) / weights[layer]
            break
        result[layer] = right
        left_over -= removed
    return meet_budget(
        result, weights, sparsity, most=max(MOST, *(curve[-1][0] for curve in curves))
    )


def meet_budget(
    wanted: Sequence[float], weights: Sequence[int], sparsity: float, most: float = MOST
) -> list[float]:
    """Move all sparsities by one and the same amount, and no farther than 0 and `most`, so that their weighted mean fits.

    Args:
        wanted: sparsity per layer, any finite numbers.
        weights: number of weights per layer, the weights of the mean.
        sparsity: the mean.
        most: the highest sparsity that a layer may get.

    Returns:
        Sparsities in [0, most] with Σ weight·sparsity = `sparsity`·Σ weight, to rounding.

    Raises:
        ValueError: no layers, numbers that do not belong together, or a sparsity outside of [0, most].
    """
    _check(weights, sparsity)
    if len(wanted) != len(weights) or not all(math.isfinite(value) for value in wanted):
        raise ValueError(
            f"there must be one finite value for each of the {len(weights)} layers, got {wanted}"
        )
    if not sparsity <= most < 1:
        raise ValueError(
            f"a sparsity of {sparsity} in all does not fit under a most of {most} per layer (below 1)"
        )
    # The mean rises with the shift, from all at 0 to all at `most`: bisection down to neighbouring floats.
    low, high = -max(wanted), most - min(wanted)
    budget = sparsity * sum(weights)
    while low < (shift := (low + high) / 2) < high:
        if _total(wanted, weights, shift, most) < budget:
            low = shift
        else:
            high = shift
    return [min(most, max(0.0, value + high)) for value in wanted]


def round_to_whole_weights(
    sparsities: Sequence[float], shapes: Sequence[tuple[int, int]], sparsity: float
) -> list[float]:
    """Sparsities that remove whole weights from every row, with a total that misses the budget by less than a column.

    A linear of `in` inputs loses `int(in * sparsity)` weights in each row; whatever stands behind the comma is lost.
    Here it is added up and given to the linears that were nearest to the next whole weight.

    Args:
        sparsities: per linear, in [0, 1).
        shapes: (out, in) per linear.
        sparsity: of all linears together.

    Returns:
        Per linear the smallest float s with `int(in * s)` weights as decided.

    Raises:
        ValueError: as `meet_budget`.
    """
    _check([rows * columns for rows, columns in shapes], sparsity)
    exact = [value * columns for value, (_, columns) in zip(sparsities, shapes, strict=True)]
    # What is whole but for rounding is whole.
    counts = [math.floor(value + 1e-9) for value in exact]
    budget = sparsity * sum(rows * columns for rows, columns in shapes) + 1e-6
    spare = budget - sum(rows * count for (rows, _), count in zip(shapes, counts, strict=True))
    for layer in sorted(range(len(shapes)), key=lambda at: counts[at] - exact[at]):
        rows, columns = shapes[layer]
        if rows <= spare and counts[layer] + 1 < columns:
            counts[layer] += 1
            spare -= rows
    result = []
    for count, (_, columns) in zip(counts, shapes, strict=True):
        value = count / columns
        result.append(value if int(columns * value) == count else math.nextafter(value, 1))
    return result


def outlier_share(scores: Sequence[Tensor], multiple: float = 5.0) -> float:
    """The share of all scores of a layer that lie over `multiple` times their mean (M in OWL).

    Args:
        scores: of the layer's linears, any shapes.
    """
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > multiple * mean).sum()) for score in scores) / count


def median_score(scores: Sequence[Tensor]) -> float:
    """The (lower) median of all scores of a layer."""
    return float(torch.cat([score.flatten() for score in scores]).median())


def removed_energy(score_OI: Tensor, sparsities: Sequence[float]) -> list[tuple[float, float]]:
    """An error curve: the squares of the lowest scores, row by row, that each sparsity would remove.

    With Wanda's scores that is the squared output error for inputs taken as uncorrelated.

    Args:
        score_OI: scores of a linear, at least 0.
        sparsities: rising, in [0, 1).

    Returns:
        Points (share really removed, error) for `allocate_by_error`, one for every different count of weights.
    """
    width = score_OI.shape[1]
    lost_I = score_OI.double().sort(dim=1).values.square_().sum(dim=0).cumsum(dim=0)
    counts = sorted({int(width * sparsity) for sparsity in sparsities})
    return [(count / width, float(lost_I[count - 1]) if count else 0.0) for count in counts]


def _spread_out(importance: Sequence[float], sparsity: float, spread: float) -> list[float]:
    """Sparsities that fall with importance, 2·`spread` from the most to the least important."""
    if not 0 <= spread <= 0.5:
        raise ValueError(f"the spread is {spread}: it must be from 0 to 0.5")
    low, high = min(importance, default=0.0), max(importance, default=0.0)
    width = high - low if high > low else math.inf
    return [sparsity - 2 * spread * (value - low) / width for value in importance]


def _lower_hull(curve: Sequence[tuple[float, float]], layer: int) -> list[tuple[float, float]]:
    places = [place for place, _ in curve]
    finite = all(math.isfinite(value) for point in curve for value in point)
    if len(curve) < 2 or not finite or any(b <= a for a, b in pairwise(places)):
        raise ValueError(
            f"the error curve of layer {layer} needs two or more finite points of rising sparsity, got {curve}"
        )
    hull: list[tuple[float, float]] = []
    for x, y in curve:
        while len(hull) > 1:
            (x1, y1), (x2, y2) = hull[-2:]
            if (y2 - y1) * (x - x1) < (y - y1) * (x2 - x1):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def _check(weights: Sequence[int], sparsity: float) -> None:
    if not weights or min(weights) < 1:
        raise ValueError(f"every layer must have weights, got {list(weights)}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"the sparsity is {sparsity}: it must be at least 0 and less than 1")


def _total(wanted: Sequence[float], weights: Sequence[int], shift: float, most: float) -> float:
    return math.fsum(
        n * min(most, max(0.0, value + shift)) for value, n in zip(wanted, weights, strict=True)
    )
