"""Which linears a recipe prunes, and whether its calibration data suit the model."""

from __future__ import annotations

from typing import NamedTuple

from prunus.methods.patterns import Pattern, check_shape
from prunus.model.skeleton import Skeleton
from prunus.pruning.options import PruningOptions


class LinearSelection(NamedTuple):
    """The linears of a model, sorted into those that are pruned and the rest.

    Attributes:
        selected: Per block the relative names of the linears to prune.
        left_dense: All other weights with two or more dimensions in the blocks: full name -> shape.
    """

    selected: list[list[str]]
    left_dense: dict[str, tuple[int, ...]]


def select_linears(skeleton: Skeleton, recipe: PruningOptions, pattern: Pattern) -> LinearSelection:
    """Apply `only` and `ignore` of a recipe to the linears of a model.

    Raises:
        ValueError: A name pattern matches nothing, or `pattern` does not fit a linear.
        NotImplementedError: The model stores its experts in an unknown form.
    """
    by_block = [skeleton.linears(index) for index in range(len(skeleton))]
    recipe.check_names(
        f"{skeleton.block_name(index)}.{linear.name}"
        for index, linears in enumerate(by_block)
        for linear in linears
    )
    found = LinearSelection([], {})
    for index, linears in enumerate(by_block):
        names = []
        for linear in linears:
            full_name = f"{skeleton.block_name(index)}.{linear.name}"
            if recipe.selects(full_name):
                check_shape(pattern, linear.shape, full_name)
                names.append(linear.name)
            else:
                found.left_dense[f"{full_name}.weight"] = linear.shape
        found.selected.append(names)
        found.left_dense.update(skeleton.left_dense(index))
    return found
