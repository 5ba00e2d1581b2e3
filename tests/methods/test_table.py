"""The table of methods: what each declares, what it refuses, and the options of all."""

import hashlib

import pytest
import torch

import prunus
from method_cases import example, gather
from prunus.methods import METHODS, Method, MethodOptions, check_options, get_method
from prunus.methods.patterns import Pattern
from tiny import tiny_checkpoint, token_ids, weights

BLOCKWISE = {"mask_order": "blockwise"}


def test_default_groups_are_those_of_the_paper():
    assert {name: method.default_group for name, method in METHODS.items()} == {
        "magnitude": "layer",
        "wanda": "row",
        "wanda-variant": "row",
        "ria": "layer",
        "sparsegpt": "layer",
        "obs": "row",
        "alps": "row",
    }
    for options in ({"mask_from": "magnitude"}, BLOCKWISE):
        assert METHODS["obs"].with_options(MethodOptions(**options)).default_group == "layer"


def test_every_declared_option_exists_and_defaults_fit_every_method():
    for name, method in METHODS.items():
        assert set(method.options) <= set(MethodOptions.model_fields), name
        check_options(method, Pattern(group=method.default_group), 0.5)


@pytest.mark.parametrize(
    ("name", "pattern", "sparsity", "options", "message"),
    [
        ("wanda", Pattern(), 1.0, {}, "sparsity is 1.0"),
        ("wanda", Pattern(), -0.1, {}, "sparsity is -0.1"),
        ("wanda", Pattern(), float("nan"), {}, "sparsity is nan"),
        ("wanda-variant", Pattern(2, 4), 0.5, {}, "no 2:4 form: each row.*Use another method"),
        ("wanda-variant", Pattern(group="layer"), 0.5, {}, "the group layer.*Use group row"),
        ("sparsegpt", Pattern(group="column"), 0.5, {}, "the group column.*row or layer"),
        ("sparsegpt", Pattern(group=4), 0.5, {}, "the group 4.*row or layer"),
        ("obs", Pattern(group="column"), 0.5, BLOCKWISE, "the group column.*row or layer"),
        ("wanda", Pattern(), 0.5, {"dense_weight": 0.5}, "wanda keeps its weights as they are"),
        ("alps", Pattern(), 0.5, {"ria_power": 1.0}, "belongs to method ria, not to alps: drop"),
        ("wanda", Pattern(), 0.5, {"iterations": 7}, "belongs to method alps, not to wanda"),
        ("sparsegpt", Pattern(), 0.5, {"mask_from": "magnitude"}, "belongs to method obs"),
        ("sparsegpt", Pattern(), 0.5, BLOCKWISE, "belongs to method obs, not to sparsegpt"),
    ],
)
def test_what_does_not_go_together_is_refused(name, pattern, sparsity, options, message):
    with pytest.raises(ValueError, match=message):
        check_options(METHODS[name], pattern, sparsity, MethodOptions(**options))


@pytest.mark.parametrize(
    ("name", "pattern", "options"),
    [
        ("sparsegpt", Pattern(2, 4, group="column"), {}),
        ("obs", Pattern(group="column"), {}),
        ("wanda", Pattern(group=7), {"damping": 0.1}),
        ("alps", Pattern(), {"weight_update": "least-squares"}),
        ("wanda-variant", Pattern(), {"weight_update": "least-squares"}),
        ("wanda", Pattern(group="column"), {"weight_update": "least-squares"}),
        ("ria", Pattern(), {"ria_power": 1.0}),
        ("alps", Pattern(), {"iterations": 7}),
    ],
)
def test_what_goes_together_passes(name, pattern, options):
    check_options(METHODS[name], pattern, 0.5, MethodOptions(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ria_power": -0.5}, r"ria_power must lie in \[0, 2\]; got -0\.5"),
        ({"ria_power": float("nan")}, r"ria_power must lie in \[0, 2\]; got nan"),
        ({"iterations": 0}, "iterations must be at least 1; got 0"),
        ({"damping": 0.0}, r"damping must lie in \(0, 1\)"),
        ({"damping": 1.5}, r"damping must lie in \(0, 1\).*got 1\.5"),
        ({"damping": float("nan")}, r"damping must lie in \(0, 1\)"),
        ({"dense_weight": 2.0}, r"dense_weight must lie in \[0, 1\]"),
        ({"dense_weight": "auto"}, "dense_weight.*number"),
        ({"weight_update": "ridge"}, "weight_update"),
        ({"mask_order": "after"}, "mask_order"),
        ({"mask_from": "ria"}, "mask_from"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MethodOptions(**options)
    assert MethodOptions(dense_weight="0.25").dense_weight == 0.25


OWN = """
import torch
from prunus.methods import Method, keep_mask, masked

def prune(weight_OI, statistics, work):
    score_OI = weight_OI.abs() * statistics.norms_I ** 2
    return masked(weight_OI, keep_mask(score_OI, work.pattern, work.sparsity))

SQUARED = Method(name="squared", summary="squared norms", function=prune, needs="norms")
NOT_ONE = "text"
"""


def test_a_method_of_ones_own_is_read_from_its_file(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    method = get_method(f"{file}:SQUARED")
    assert get_method(f"{file}:SQUARED") is method
    weight_OI, X_TI = example(5, 12)
    found = method.prune(weight_OI, gather(X_TI), Pattern(), 0.5)
    score_OI = weight_OI.abs() * X_TI.norm(dim=0).square()
    assert torch.equal(found.keep_OI, METHODS["magnitude"].prune(
        score_OI, gather(X_TI), Pattern(), 0.5
    ).keep_OI)  # fmt: skip
    file.write_text(OWN.replace('"squared norms"', '"changed"'))
    assert get_method(f"{file}:SQUARED").summary == "changed"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{own}", "names a file but no method in it"),
        ("{own}:", "names a file but no method in it"),
        ("{own}:MISSING", "has no MISSING: its methods are SQUARED"),
        ("{own}:NOT_ONE", "has a str, not a Method, as NOT_ONE"),
        ("given:squared", "'squared' was given in Python"),
    ],
)
def test_a_name_without_a_method_is_refused(name, message, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(OWN)
    with pytest.raises(ValueError, match=message):
        get_method(name.format(own=own))


def test_a_method_is_given_as_an_object():
    method = Method(
        name="mine", summary="", function="prunus.methods.wanda:prune", needs="norms", groups=(3,)
    )
    with pytest.raises(ValueError, match="does not support the group row"):
        check_options(method, Pattern(), 0.5)
    weight_OI, X_TI = example(6, 12)
    pruned = method.prune(weight_OI, gather(X_TI), Pattern(group=3), 0.5)
    assert int(pruned.keep_OI.sum()) == 36


def test_a_run_with_a_method_of_ones_own_is_recorded_and_not_mixed_with_another(tmp_path):
    dense, file = tiny_checkpoint(tmp_path / "dense"), tmp_path / "own.py"
    file.write_text(OWN)
    name, options = f"{file}:SQUARED", {"calibration": token_ids()}
    record = prunus.prune(dense, tmp_path / "out", method=name, **options)
    assert record.recipe.method == name
    assert record.inputs.method_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    given = prunus.prune(dense, tmp_path / "given", method=get_method(name), **options)
    assert given.recipe.method == "given:squared" and given.inputs.method_sha256
    one, two = (weights(tmp_path / folder) for folder in ("out", "given"))
    assert all(torch.equal(each, two[key]) for key, each in one.items())
    file.write_text(OWN.replace("** 2", "** 3"))
    with pytest.raises(FileExistsError, match="another method_sha256"):
        prunus.prune(dense, tmp_path / "out", method=name, **options)
    with pytest.raises(ValueError, match="ria_power belongs to method ria, not to squared"):
        prunus.prune(dense, tmp_path / "no", method=name, ria_power=1.0, **options)
    assert not (tmp_path / "no").exists()
