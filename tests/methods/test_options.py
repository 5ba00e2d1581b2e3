"""The options of methods: one table of ranges and owners, for recipes and for methods alike."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import get_args

import pytest

from prunus.methods import METHODS, MethodOptions, check_options
from prunus.methods.options import RULES, MethodName, check_method_options, in_range
from prunus.methods.patterns import Pattern
from prunus.pruning.recipe import Recipe


def test_every_option_has_a_rule_except_how_the_work_is_done():
    names = {field.name for field in fields(MethodOptions)}
    assert names - set(RULES) == {"quantization", "reference_order", "row_sharding"}
    assert set(RULES) <= names


def test_the_names_of_methods_are_those_of_the_table():
    assert get_args(MethodName) == tuple(METHODS)
    assert all(set(rule.methods) <= set(METHODS) for rule in RULES.values())


@pytest.mark.parametrize("method", METHODS)
def test_defaults_fit_every_method(method):
    check_method_options(method, MethodOptions())


@pytest.mark.parametrize(
    ("option", "value", "owner"),
    [
        ("mask_from", "magnitude", "obs"),
        ("mask_order", "blockwise", "obs"),
        ("ria_power", 1.0, "ria"),
        ("iterations", 7, "alps"),
    ],
)
def test_a_recipe_and_a_method_refuse_the_option_of_another_method_alike(option, value, owner):
    check_options(owner, Pattern(), 0.5, MethodOptions(**{option: value}))
    assert getattr(Recipe(method=owner, **{option: value}).method_options, option) == value
    message = f"{option} belongs to method '{owner}', not to 'wanda': drop it or choose --method"
    with pytest.raises(ValueError, match=message):
        check_options("wanda", Pattern(), 0.5, MethodOptions(**{option: value}))
    with pytest.raises(ValueError, match=message):
        Recipe(method="wanda", **{option: value})


@pytest.mark.parametrize("damping", [0.0, 1.0, -0.1, float("nan"), float("inf")])
def test_a_recipe_and_a_method_have_the_same_range_of_damping(damping):
    for read in (
        lambda: Recipe(method="alps", damping=damping),
        lambda: check_options("alps", Pattern(), 0.5, MethodOptions(damping=damping)),
    ):
        with pytest.raises(ValueError, match=r"damping must lie in \(0, 1\)"):
            read()


def test_column_block_belongs_to_the_methods_that_sweep():
    for method in ("sparsegpt", "obs"):
        check_method_options(method, MethodOptions(column_block=64))
    with pytest.raises(ValueError, match="belongs to method 'sparsegpt' and 'obs', not to 'alps'"):
        check_method_options("alps", MethodOptions(column_block=64))


def test_refine_steps_need_a_refinement():
    check_method_options("wanda", MethodOptions(refine="swaps", refine_steps=3))
    with pytest.raises(ValueError, match="refine_steps belongs to refine"):
        check_method_options("wanda", MethodOptions(refine_steps=3))


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("(0, 1)", (0.1, 0.9), (0, 1, -1, float("nan"))),
        ("[0, 1]", (0, 1), (-0.1, 1.1)),
        ("[0, 1)", (0, 0.9), (1,)),
    ],
)
def test_brackets_include_their_end_and_parentheses_do_not(interval, inside, outside):
    rule = in_range(interval)
    assert all(map(rule.allows, inside))
    assert not any(map(rule.allows, outside))


def test_options_are_read_without_torch():
    code = "import sys, prunus.methods.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
