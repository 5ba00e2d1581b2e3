"""The keyword arguments of `prune` are the options of a recipe, each once and of the same type."""

from __future__ import annotations

import inspect
from typing import get_args, get_type_hints

import pytest

import prunus
from prunus.pruning.recipe import Recipe
from prunus.pruning.recipe_options import NAMED_ARGUMENTS, RecipeOptions, recipe_from
from tiny import tiny_checkpoint, token_ids


def test_every_option_of_a_recipe_is_a_keyword_of_prune():
    keywords = set(get_type_hints(RecipeOptions))
    assert keywords | set(NAMED_ARGUMENTS) == set(Recipe.model_fields)
    assert not keywords & set(NAMED_ARGUMENTS)
    assert set(NAMED_ARGUMENTS) <= set(inspect.signature(prunus.prune).parameters)


@pytest.mark.parametrize("name", get_type_hints(RecipeOptions))
def test_a_keyword_has_the_type_of_its_option(name):
    option, keyword = Recipe.model_fields[name].annotation, get_type_hints(RecipeOptions)[name]
    if name in ("only", "ignore"):
        # A list of name patterns is as good as a tuple.
        assert option in get_args(keyword)
    else:
        assert keyword == option


def test_a_recipe_is_given_as_an_object_a_path_or_the_text_of_a_path(tmp_path):
    recipe = Recipe(method="ria", sparsity=0.6, seed=3)
    file = tmp_path / "recipe.toml"
    file.write_text(recipe.to_toml())
    for base in (recipe, file, str(file)):
        assert recipe_from(base, {}) == recipe
        assert recipe_from(base, {"sparsity": 0.4, "seed": None}) == recipe.model_copy(
            update={"sparsity": 0.4}
        )
    assert recipe_from(None, {"seed": 1}) == Recipe(seed=1)


def test_overrides_of_a_recipe_object_are_checked_like_all_options():
    two_of_four = Recipe(pattern="2:4")
    assert recipe_from(two_of_four, {"pattern": "1:4"}) == Recipe(pattern="1:4")
    assert recipe_from(Recipe(preset="best"), {"seed": 1}) == Recipe(preset="best", seed=1)
    with pytest.raises(ValueError, match="already fixes the sparsity"):
        recipe_from(two_of_four, {"sparsity": 0.3})
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        recipe_from(Recipe(), {"sparsity": 2.0})
    with pytest.raises(ValueError, match="Give it to the Recipe"):
        recipe_from(Recipe(), {"preset": "best"})


def test_prune_takes_a_recipe_object(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense")
    recipe = Recipe(method="magnitude", sparsity=0.25)
    manifest = prunus.prune(dense, tmp_path / "out", recipe=recipe, calibration=token_ids())
    assert (manifest.recipe.method, manifest.recipe.sparsity) == ("magnitude", 0.25)
    assert manifest.recipe.calibration == "token ids"
