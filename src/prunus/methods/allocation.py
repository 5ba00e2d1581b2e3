"""How a sparsity is allocated to layers, where a layer is a block or a single linear.

These are pure functions from a few numbers per layer to a sparsity per layer. Their mean, weighted
by the layers' numbers of weights, is the sparsity of the whole. Imports no torch.

    allocate_by_error       by curves of the error over the sparsity
    allocate_by_outliers    by the share of outliers: OWL
    shares_by_hand          as the user says, by names or by blocks
    check_rule              a function of the user's own, before the run
    check_sparsities        what a function of the user's own returns
"""

from __future__ import annotations

import fnmatch
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from prunus.methods.own_code import OwnCode
from prunus.options import between
from prunus.words import did_you_mean, nearest_glob

#: The rules of allocation, also a user's own.
ALLOCATION_NAMES = OwnCode(
    option="allocation",
    known=("uniform", "fisher", "owl"),
    must="function",
    path="a function",
    fits=callable,
)
# Sparsities by hand that differ less than this from the one that is asked for add up to it.
_SAME_SPARSITY = 0.0005


class Share(NamedTuple):
    """Linears that have one sparsity by hand.

    Attributes:
        rule: What chose them: a glob, "block 3", or "the rest".
        sparsity: The share of their weights to remove.
        weights: Full name of each linear -> its number of weights.
    """

    rule: str
    sparsity: float
    weights: dict[str, int]


def mean_sparsity(shares: Sequence[Share]) -> float:
    """The mean over all weights.

    >>> mean_sparsity([Share("a", 0.5, {"a": 30}), Share("b", 0.1, {"b": 10})])
    0.4
    """
    removed = math.fsum(share.sparsity * sum(share.weights.values()) for share in shares)
    return removed / sum(sum(share.weights.values()) for share in shares)


def shares_by_hand(
    rules: Sequence[tuple[str, float] | float],
    blocks: Sequence[Mapping[str, int]],
    rest: float,
    asked: float | None = None,
    outside: Mapping[str, int] | None = None,
) -> list[Share]:
    """The linears of every sparsity that the user gives by hand.

    Args:
        rules: Pairs of a glob and a sparsity, of which the first that matches the full name of a
            linear counts; or a sparsity for each block.
        blocks: For each block its linears: full name -> number of weights.
        rest: The sparsity of linears that no rule names.
        asked: The mean that the sparsities must have if the rules name all linears; None for any.

    Raises:
        ValueError: A glob matches no linear, or only such that an earlier glob matches; the numbers
            are more or fewer than the blocks; or they do not have the mean that was asked for.

    >>> blocks = [{"0.q": 10, "0.up": 30}, {"1.q": 10, "1.up": 30}]
    >>> [(s.rule, s.sparsity, [*s.weights]) for s in shares_by_hand([("*.up", 0.6)], blocks, 0.5)]
    [('*.up', 0.6, ['0.up', '1.up']), ('the rest', 0.5, ['0.q', '1.q'])]
    >>> shares_by_hand([("*.up", 0.6), ("*", 0.2)], blocks, 0.5, asked=0.4)
    Traceback (most recent call last):
    ValueError: the sparsities by hand have the mean 0.5, and `sparsity` asks for 0.4: leave \
`sparsity` out, or change them
    """
    pairs = [rule for rule in rules if isinstance(rule, tuple)]
    left = {name: weights for block in (*blocks, outside or {}) for name, weights in block.items()}
    every, shares = list(left), list[Share]()
    for glob, sparsity in pairs:
        matched = [name for name in left if fnmatch.fnmatchcase(name, glob)]
        if not matched:
            check_glob("sparsity_of", glob, every)
            raise ValueError(
                f"`sparsity_of` {glob!r} never counts, because globs before it match all of its "
                "linears and the first that matches counts: put it before them"
            )
        shares.append(Share(glob, sparsity, {name: left.pop(name) for name in matched}))
    if not pairs:
        if len(rules) != len(blocks):
            raise ValueError(
                f"`sparsity_of` has {len(rules)} numbers, and the model has {len(blocks)} blocks: "
                "give one number per block, or globs"
            )
        for number, (share, block) in enumerate(zip(rules, blocks, strict=True)):
            assert isinstance(share, float)
            shares.append(Share(f"block {number}", share, dict(block)))
        left = dict(outside or {})
    if left:
        shares.append(Share("the rest", rest, left))
    mean = mean_sparsity(shares)
    if asked is not None and not left and abs(mean - asked) > _SAME_SPARSITY:
        raise ValueError(
            f"the sparsities by hand have the mean {mean:.4g}, and `sparsity` asks for {asked:g}: "
            "leave `sparsity` out, or change them"
        )
    return shares


def check_glob(option: str, glob: str, names: Sequence[str]) -> None:
    """Check that a pattern of names matches: a typing error would prune the wrong linears.

    Args:
        option: The option that has the glob.
        glob: The pattern.
        names: Full names of the linears that it may match.

    Raises:
        ValueError: It matches none; names the nearest pattern that does.
    """
    if not any(fnmatch.fnmatchcase(name, glob) for name in names):
        ends = dict.fromkeys(name.rpartition(".")[2] for name in names)
        raise ValueError(
            f"`{option}` {glob!r} matches none of the {len(names)} linears; names look like "
            f"{names[0]!r}, and * stands for anything: they match "
            f"{', '.join(f'*.{last}' for last in ends)}{nearest_glob(glob, names)}"
        )


def check_rule(rule: Callable[..., Any], name: str) -> None:
    """Check that a user's own rule can be called, before the model is measured for it.

    Args:
        rule: The function.
        name: Its name, for errors.

    Raises:
        ValueError: It needs a parameter that it does not get, or takes none.

    >>> check_rule(lambda statistics, sparsity, power: {}, "mine")
    Traceback (most recent call last):
    ValueError: allocation mine gets the statistics and, if it has parameters of these names, \
sparsity and weight_of: missing a required argument: 'power'
    """
    signature = inspect.signature(rule)
    known = {key: None for key in ("sparsity", "weight_of") if key in signature.parameters}
    try:
        signature.bind({}, **known)
    except TypeError as fault:
        raise ValueError(
            f"allocation {name} gets the statistics and, if it has parameters of these names, "
            f"sparsity and weight_of: {fault}"
        ) from None


def check_sparsities(found: Any, names: Collection[str], rule: str) -> dict[str, float]:
    """What a rule returned, if it gives every linear a sparsity.

    Args:
        found: What it returned.
        names: Full names of the linears.
        rule: The name of the rule, for errors.

    Raises:
        ValueError: It is no mapping, a linear has no sparsity, a name is no linear's, or a sparsity
            is out of range.

    >>> check_sparsities({"a.q": 0.5}, ["a.q", "a.up"], "mine")
    Traceback (most recent call last):
    ValueError: allocation mine must give a sparsity to every linear that is pruned, and to \
nothing else: 'a.up' has none
    """
    if not isinstance(found, Mapping):
        raise ValueError(
            f"allocation {rule} must return a mapping from names of linears to sparsities; it "
            f"returned a {type(found).__name__}"
        )
    for name in (*names, *found):
        if name not in found or name not in names:
            raise ValueError(
                f"allocation {rule} must give a sparsity to every linear that is pruned, and to "
                f"nothing else: {name!r} "
                + ("has none" if name in names else f"is none{did_you_mean(name, names)}")
            )
        between("[0, 1)").check(f"the sparsity that allocation {rule} gives {name}", found[name])
    return {name: float(found[name]) for name in names}


def allocate_by_outliers(
    outliers: Sequence[float], weights: Sequence[int], sparsity: float, spread: float = 0.08
) -> list[float]:
    """Layers with more outliers keep more weights: OWL (Yin et al. 2024, arXiv 2310.05175).

    As in the original code, the sparsities are a linear function of the outliers, the highest and
    the lowest differ by 2·`spread`, and their mean is `sparsity`. (The paper says that none differs
    from `sparsity` by more than `spread`. That holds where the outliers lie evenly about their
    mean.)

    Args:
        outliers: The share of outliers of each layer, in any unit.
        weights: The number of weights of each layer. The original has layers of one size.
        sparsity: The sparsity of all layers together.
        spread: λ of the paper.

    Returns:
        The sparsity of each layer.

    Raises:
        ValueError: A layer would lose all its weights.

    >>> [round(value, 2) for value in allocate_by_outliers([0.0, 1.0, 4.0, 3.0], [1] * 4, 0.7)]
    [0.78, 0.74, 0.62, 0.66]
    """
    low, high = min(outliers), max(outliers)
    if low == high:
        return [sparsity] * len(outliers)
    kept = [2 * spread * (value - low) / (high - low) for value in outliers]
    mean = math.fsum(k * n for k, n in zip(kept, weights, strict=True)) / sum(weights)
    shares = [sparsity + mean - value for value in kept]
    if max(shares) >= 1:
        raise ValueError(
            f"allocation owl cannot keep sparsity {sparsity:g}: it would remove "
            f"{max(shares):.1%} of a block; lower `sparsity`, or choose uniform or fisher"
        )
    return shares


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
