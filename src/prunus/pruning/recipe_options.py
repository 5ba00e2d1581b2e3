"""The keyword arguments that `prunus.prune` passes on to a recipe, as a type. Imports no torch.

`Recipe` in `recipe.py` validates and explains every option; a test holds this list equal to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from prunus.pruning.recipe import Recipe
from prunus.pruning.recipe_file import load_recipe

__all__ = ["NAMED_ARGUMENTS", "RecipeOptions", "recipe_from"]

#: Options of a recipe that are parameters of `prune` in their own right.
NAMED_ARGUMENTS = ("method", "sparsity", "pattern", "calibration")


class RecipeOptions(TypedDict, total=False):
    """All options of `Recipe` but `NAMED_ARGUMENTS`; see there for what each one means."""

    preset: str | None
    group: str | int | None
    samples: int
    seqlen: int
    seed: int
    bos: Literal["auto", "yes", "no"]
    batch: int | None
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    propagate: Literal["linear", "block"]
    head: bool
    only: tuple[str, ...] | list[str]
    ignore: tuple[str, ...] | list[str]
    min_expert_tokens: int | None
    mask_from: Literal["wanda", "magnitude"]
    mask_order: Literal["before", "blockwise"]
    damping: float | None
    ria_power: float
    iterations: int | None
    bits: float | None
    head_bits: int | None
    refine: Literal["none", "swaps"]
    refine_steps: int | None
    weight_update: Literal["none", "least-squares"]
    dense_weight: float | Literal["auto"]
    reconstruct: Literal["none", "last", "quick", "all"]
    reconstruct_epochs: int | None
    reconstruct_lr: float | None
    allocation: Literal["uniform", "search"]
    allocation_by: Literal["block", "linear"]


def recipe_from(base: Recipe | str | Path | None, overrides: Mapping[str, Any]) -> Recipe:
    """A recipe with `overrides` on top; an override of None leaves the base as it is.

    >>> recipe_from(Recipe(method="ria", sparsity=0.6), {"sparsity": 0.5, "seed": None}).method
    'ria'

    Args:
        base: A recipe, the path of a TOML file, or None for the defaults.
        overrides: Options by name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not TOML, an option is unknown, or a value is out of range.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    if not isinstance(base, Recipe):
        return load_recipe(Path(base) if base is not None else None, given)
    if not given:
        return base
    if "preset" in given:
        raise ValueError(
            f"preset={given['preset']!r} beside a Recipe: a preset fills in what a recipe leaves "
            "open. Give it to the Recipe instead"
        )
    known = base.model_dump(exclude_unset=True)
    if "pattern" in given and base.n_of_m:
        known.pop("sparsity", None)  # The base's own pattern implied it.
    return load_recipe(None, known | given)
