"""Recipes: which values they accept and refuse, which linears they select, how they are written."""

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from prunus.pruning.recipe import Recipe
from prunus.words import parse_bytes
from refusals import assert_refused

# Any text that UTF-8 can hold: names of files and of linears may be anything.
TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
SHAPES = st.one_of(
    st.fixed_dictionaries({"sparsity": st.floats(0, 1, exclude_max=True)}),
    st.integers(1, 16).flatmap(
        lambda m: st.builds(lambda n: {"pattern": f"{n}:{m}"}, st.integers(1, m))
    ),
)
METHODS = st.one_of(
    st.fixed_dictionaries(
        {"method": st.sampled_from(["magnitude", "wanda", "wanda-variant", "sparsegpt"])}
    ),
    st.fixed_dictionaries({"method": st.just("ria"), "ria_power": st.floats(0, 2)}),
    st.fixed_dictionaries({"method": st.just("alps"), "iterations": st.integers(1, 999)}),
    st.fixed_dictionaries(
        {
            "method": st.just("obs"),
            "mask_from": st.sampled_from(["wanda", "magnitude"]),
            "mask_order": st.sampled_from(["before", "blockwise"]),
        }
    ),
)
OTHERS = st.fixed_dictionaries(
    {},
    optional={
        "group": st.one_of(st.sampled_from(["row", "layer", "column"]), st.integers(1, 9999)),
        "calibration": TEXT,
        "samples": st.integers(1, 10**6),
        "seqlen": st.integers(2, 10**6),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "batch": st.integers(1, 10**4),
        "dtype": st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
        "propagate": st.sampled_from(["linear", "block"]),
        "only": st.lists(TEXT, max_size=3).map(tuple),
        "ignore": st.lists(TEXT, max_size=3).map(tuple),
        "damping": st.floats(0, 1, exclude_min=True, exclude_max=True),
        "weight_update": st.sampled_from(["none", "least-squares"]),
    },
)
RECIPES = st.builds(
    lambda *parts: Recipe(**parts[0], **parts[1], **parts[2]), SHAPES, METHODS, OTHERS
)


@settings(deadline=None, max_examples=40)
@given(recipe=RECIPES)
def test_every_recipe_survives_a_round_trip_through_toml(recipe, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.read(path, {}) == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    written = tomllib.loads(recipe.to_toml())
    assert set(written) == {key for key, value in recipe.model_dump().items() if value is not None}


def test_the_default_recipe_cannot_be_changed():
    recipe = Recipe.read(None, {})  # the defaults are those of the paper
    assert (recipe.method, recipe.sparsity, recipe.n_of_m) == ("wanda", 0.5, None)
    assert (recipe.calibration, recipe.samples, recipe.seqlen, recipe.seed) == ("mix", 1024, 256, 0)
    with pytest.raises(ValidationError):
        recipe.sparsity = 0.9
    assert recipe.sparsity == 0.5


def test_a_pattern_fixes_the_sparsity():
    assert Recipe(pattern="2:4").sparsity == 0.5
    assert Recipe(pattern="1:4").sparsity == 0.75
    assert Recipe(pattern="1:4", sparsity=0.75).n_of_m == (1, 4)
    assert Recipe(pattern="4:4").sparsity == 0
    for text in ("", "2", "2:", "2:4:8", "-2:4", "2.0:4", "half", " 2:4", "2:4\n", "5:4", "0:0"):
        assert_refused(ValueError, "pattern", Recipe, pattern=text)
    with pytest.raises(ValueError, match=r"pattern 1:4 already fixes the sparsity at 0\.75; got"):
        Recipe(pattern="1:4", sparsity=0.5)


def test_a_number_of_rows_may_be_written_as_text():
    assert Recipe(group="8").group == 8
    for wrong in ("0", "-1", "1.5", "rows", True, 0):
        assert_refused(ValueError, "group must be row, layer, column", Recipe, group=wrong)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sparsity = ", r"recipe .*recipe\.toml is not valid TOML"),
        (
            "sparcity = 0.5",
            r"recipe .*\.toml: unknown option 'sparcity'; did you mean sparsity\?$",
        ),
        ("sparsity = 1.5", r"sparsity must lie in \[0, 1\).*got 1\.5"),
        ("samples = 0\nseqlen = 1", r"samples must be at least 1.*; seqlen must be at least 2"),
        ("min_expert_tokens = -1", "min_expert_tokens must be at least 0"),
        ("samples = 1.5", r"samples must be a whole number \(got 1\.5\)$"),
        ('only = "*.mlp.*"', "only: "),
        ('device = "cpu"', "unknown option 'device'"),
    ],
)
def test_bad_recipe_files(content, message, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(content)
    assert_refused(ValueError, message, Recipe.read, path, {})


def test_a_recipe_file_that_is_missing_or_not_text(tmp_path):
    assert_refused(
        FileNotFoundError, r"no recipe file .*gone\.toml", Recipe.read, tmp_path / "gone.toml", {}
    )
    (tmp_path / "latin.toml").write_bytes(b'calibration = "\xe9"')
    assert_refused(
        ValueError, r"latin\.toml is not valid TOML", Recipe.read, tmp_path / "latin.toml", {}
    )


NAMES = [
    f"model.layers.{i}.{name}"
    for i in range(3)
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
]


@pytest.mark.parametrize(
    ("only", "ignore", "count"),
    [
        ((), (), 9),
        (("*.mlp.*",), (), 6),
        (("*.mlp.*", "*.q_proj"), (), 9),
        ((), ("*.down_proj",), 6),
        (("*.mlp.*",), ("*.down_proj",), 3),
        (("model.layers.[02].*",), ("*.1.*", "*.up_proj"), 4),
        (("mlp.up_proj",), (), 0),
        (("*.MLP.*",), (), 0),
    ],
)
def test_only_and_ignore_select_by_full_name(only, ignore, count):
    recipe = Recipe(only=only, ignore=ignore)
    assert sum(map(recipe.selects, NAMES)) == count


@pytest.mark.parametrize(
    ("only", "ignore", "message"),
    [
        (
            ("*.mlp.*", "mlp"),
            (),
            r"`only` 'mlp' matches none of the 9 linears; names look like 'model\.layers\.0",
        ),
        ((), ("lm_head",), "`ignore` 'lm_head' matches none of the 9 linears"),
        (("*.q_proj",), ("*.self_attn.*",), "`only` and `ignore` leave no linear to prune"),
    ],
)
def test_patterns_that_select_nothing_are_refused(only, ignore, message):
    assert_refused(ValueError, message, Recipe(only=only, ignore=ignore).check_names, NAMES)


def test_sizes():
    for text, size in {
        "10000": 10_000,
        "4B": 4,
        "1KB": 1024,
        "8 gib": 8 * 1024**3,
        " 512mb ": 512 * 1024**2,
        "1.5GiB": 3 * 1024**3 // 2,
        "2T": 2 * 1024**4,
    }.items():
        assert parse_bytes(text) == size
    wrong = ["", "GB", "-1GB", "8PB", "1e9", "8 GB free", "8,5GB", "0", "0.0GB", "nan", "inf"]
    for text in (*wrong, "8\0", "8" + "B" * 1000):
        assert_refused(
            ValueError, r"a memory size (looks like|must be larger than)", parse_bytes, text
        )


@pytest.mark.parametrize("name", Recipe.PRESETS)
def test_a_preset_fills_in_what_the_user_leaves_open(name):
    chosen = Recipe(preset=name)
    for key, value in Recipe.PRESETS[name].items():
        assert getattr(chosen, key) == value
    other = Recipe(preset=name, sparsity=0.7, seed=3, damping=0.2)
    assert (other.method, other.sparsity, other.seed, other.damping) == (chosen.method, 0.7, 3, 0.2)


@pytest.mark.parametrize("preset", ["balanced", "best"])
def test_a_preset_depends_on_the_pattern(preset):
    chosen = {
        pattern: Recipe(preset=preset, pattern=pattern)
        for pattern in ("unstructured", "2:4", "4:8")
    }
    assert {pattern: each.allocation for pattern, each in chosen.items()} == {
        "unstructured": "fisher",
        "2:4": "uniform",
        "4:8": "uniform",
    }
    assert Recipe(preset=preset, allocation="uniform").allocation == "uniform"
    with pytest.raises(ValueError, match="distributes an unstructured sparsity"):
        Recipe(allocation="fisher", pattern="2:4")


def test_explicit_options_override_a_preset(tmp_path):
    chosen = Recipe(preset="best", method="sparsegpt", reconstruct="none", pattern="2:4")
    assert (chosen.method, chosen.dense_weight, chosen.reconstruct, chosen.sparsity) == (
        "sparsegpt",
        0.25,
        "none",
        0.5,
    )
    (tmp_path / "recipe.toml").write_text(chosen.to_toml(), encoding="utf-8")
    assert Recipe.read(tmp_path / "recipe.toml", {}) == chosen
    assert_refused(
        ValueError, "choose one of fast, balanced, best", Recipe.read, None, {"preset": "fastest"}
    )
