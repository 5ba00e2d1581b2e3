"""Sparsities that the user gives: by hand, by OWL, and by a function of the user's own."""

import json
import math

import pytest
import torch

import prunus
import reference
from command_line import call
from prunus.engine.block_memory import Memory
from prunus.methods.allocation import allocate_by_outliers
from prunus.pruning import allocate_sparsity
from prunus.pruning.manifest import Manifest
from prunus.pruning.recipe import Recipe
from refusals import assert_refused
from sensitivity_cases import IDS, whole_model
from stopping import interrupt
from tiny import ids_file, shards, tiny_checkpoint, token_ids, weights

BLOCKS = 3
WINDOWS = ("--samples", 6, "--seqlen", 16)
BY_HAND = {"*.mlp.*": 0.75, "*.1.self_attn.?_proj": 0, "*": 0.25}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A checkpoint of three blocks; no test writes to it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("by_hand") / "dense", num_hidden_layers=BLOCKS)


def sparsity_of(record: Manifest) -> dict[str, float]:
    """Full name of a linear -> the share of its weights that is zero."""
    return {f"{x.name}.{name}": y.sparsity for x in record.blocks for name, y in x.linears.items()}


# --- by hand ---


def expected_by_hand(name: str) -> float:
    if ".mlp." in name:
        return 0.75
    return 0 if ".1.self_attn." in name else 0.25


def test_the_first_glob_that_matches_decides_the_sparsity_of_a_linear(dense, tmp_path):
    record = prunus.prune(dense, tmp_path / "out", sparsity=BY_HAND, calibration=token_ids())
    found = sparsity_of(record)
    assert found == record.allocation == {name: expected_by_hand(name) for name in found}
    before, after = weights(dense), weights(tmp_path / "out")
    kept = [name for name in before if ".1.self_attn." in name]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)
    read = Manifest.load(tmp_path / "out")
    assert read.recipe == record.recipe and read.recipe.sparsity_of == tuple(BY_HAND.items())
    assert read.asked_sparsity == pytest.approx(read.totals["sparsity"])
    assert "was asked for" not in read.table().note
    for (glob, share), note in zip(
        BY_HAND.items(), read.table().note.splitlines()[-3:], strict=False
    ):
        assert note.startswith(f"{glob}: {share:.2%} asked for in ")


def test_files_and_the_command_line_give_the_same_sparsities_as_python(dense, tmp_path):
    ids = ids_file(tmp_path / "ids.safetensors")
    options = {"calibration": ids, "samples": 6, "seqlen": 16}
    python = prunus.prune(dense, tmp_path / "python", sparsity=BY_HAND, **options)
    table = ", ".join(f'"{glob}" = {share}' for glob, share in BY_HAND.items())
    (tmp_path / "table.toml").write_text(f"sparsity = {{{table}}}")
    (tmp_path / "pairs.toml").write_text(python.recipe.to_toml())
    for file in ("table", "pairs"):
        prunus.prune(dense, tmp_path / file, recipe=tmp_path / f"{file}.toml", **options)
        assert shards(tmp_path / file) == shards(tmp_path / "python")
    first, second, _ = [f"--sparsity-of={glob}={share}" for glob, share in BY_HAND.items()]
    flags = (first, second, "--sparsity", 0.25, "--calibration", ids)
    call("prune", dense, tmp_path / "flags", *flags, *WINDOWS)
    assert shards(tmp_path / "flags") == shards(tmp_path / "python")
    again = prunus.prune(dense, tmp_path / "again", recipe=python.recipe)
    assert again.allocation == python.allocation


def test_every_block_has_its_number_and_the_head_that_of_the_rest(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", tie_word_embeddings=False)
    options = {"calibration": token_ids(), "head": True, "preset": "fast"}
    record = prunus.prune(dense, tmp_path / "out", sparsity=[0.25, 0.75], **options)
    for index, block in enumerate(record.blocks):
        assert {x.sparsity for x in block.linears.values()} == {(0.25, 0.75)[index]}
    assert record.head.sparsity == record.allocation["lm_head"] == 0.5
    globs = {"lm_head": 0.125, "*": 0.5}
    record = prunus.prune(dense, tmp_path / "globs", sparsity=globs, **options)
    assert record.head.sparsity == 0.125
    assert record.asked_sparsity == pytest.approx(record.totals["sparsity"])


def test_the_plan_shows_the_mean_and_the_weights_of_every_glob(dense, tmp_path):
    ids = ids_file(tmp_path / "ids.safetensors")
    command = ("plan", dense, "--sparsity-of", "*.mlp.*=0.75", "--calibration", ids, *WINDOWS)
    shown = call(*command, "--json", tmp_path / "plan.json").output
    plan = json.loads((tmp_path / "plan.json").read_text())
    mlp, rest = plan["allocation"]["shares"]
    assert (mlp["rule"], mlp["sparsity"], mlp["linears"]) == ("*.mlp.*", 0.75, 3 * BLOCKS)
    assert (rest["rule"], rest["sparsity"], rest["linears"]) == ("the rest", 0.5, 4 * BLOCKS)
    assert mlp["weights"] + rest["weights"] == plan["weights"]
    removed = 0.75 * mlp["weights"] + 0.5 * rest["weights"]
    assert plan["allocation"]["sparsity"] == pytest.approx(removed / plan["weights"])
    assert plan["to_remove"] == int(removed)
    assert "by hand" in shown and f"75.00% of {mlp['weights']:,} weights" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": {"*.mpl.*": 0.6}}, r"matches none of the 21 linears.*mean '\*\.mlp\.\*'\?$"),
        ({"sparsity": {"*": 0.4, "*.mlp.*": 0.6}}, r"'\*\.mlp\.\*' never counts.*put it before"),
        ({"sparsity": [0.5, 0.6]}, "has 2 numbers, and the model has 3 blocks"),
        ({"sparsity": {"*": 60}}, r"must lie in \[0, 1\); got 60; did you mean 0\.6\?"),
        ({"sparsity": {"*": "half"}}, r"\*: the share must be a number such as 0\.6; got 'half'$"),
        ({"sparsity_of": ["*=60%"]}, r"got '60%'; did you mean 0\.6\?$"),
        ({"sparsity": {"*.fc9": 0.6}}, r"they match \*\.\w+, .*\*\.up_proj, \*\.down_proj$"),
        ({"sparsity": [0.5, ("*", 0.5), 0.5]}, "either GLOB=SHARE.* or one number per block"),
        ({"sparsity_of": 0.5}, "a list of one per block; got 0.5"),
        ({"sparsity_of": ["mlp"]}, "give GLOB=SHARE.*got 'mlp'"),
        ({"sparsity": {"*": 0.5}, "sparsity_of": {"*": 0.5}}, "both have sparsities by hand"),
        ({"sparsity": {"*": 0.5}, "pattern": "2:4"}, "sparsity_of distributes an unstructured"),
        ({"sparsity": {"*": 0.5}, "allocation": "owl"}, "and so does sparsity_of: drop one"),
        (
            {"sparsity": 0.5, "sparsity_of": {"*.mlp.*": 0.6, "*": 0.2}},
            r"have the mean 0\.\d+, and `sparsity` asks for 0\.5",
        ),
        ({"only": ["*.mpl.*"]}, r"`only`.*did you mean '\*\.mlp\.\*'\?"),
    ],
)
def test_sparsities_that_cannot_be_meant_are_refused(options, message, dense, tmp_path):
    out = tmp_path / "out"
    assert_refused(ValueError, message, prunus.prune, dense, out, calibration=IDS, **options)


def test_sparsities_that_add_up_to_what_is_asked_are_not_refused(dense, tmp_path):
    globs = {"*.0.*": 0.25, "*.1.*": 0.75, "*": 0.5}
    record = prunus.prune(
        dense, tmp_path / "out", sparsity=0.5, sparsity_of=globs, calibration=token_ids()
    )
    assert record.totals["sparsity"] == 0.5


# --- OWL ---


def test_blocks_with_more_outliers_keep_more_weights_by_owl(dense, tmp_path, monkeypatch):
    """The outliers of the dense model, measured in one piece, against those of a run."""
    monkeypatch.setattr(allocate_sparsity, "_OUTLIER", 2)
    options = {"calibration": IDS, "dtype": "float32", "allocation": "owl", "sparsity": 0.7}
    record = prunus.prune(dense, tmp_path / "out", **options)
    linears = whole_model(dense)
    outliers, sizes = [], []
    for block in record.blocks:
        scores = []
        for name in block.linears:
            weight_OI, _, X_TI = linears[f"{block.name}.{name}"]
            scores.append(reference.wanda_score(weight_OI, X_TI).flatten())
        score = torch.cat(scores)
        outliers.append(float((score > 2 * score.mean()).double().mean()))
        sizes.append(len(score))
    with pytest.raises(ValueError, match=r"owl cannot keep sparsity 0\.97: it would remove 10\d"):
        allocate_by_outliers(outliers, sizes, 0.97)
    expected = allocate_by_outliers(outliers, sizes, 0.7)
    assert len(set(expected)) == BLOCKS
    for block, sparsity in zip(record.blocks, expected, strict=True):
        for name in block.linears:
            assert record.allocation[f"{block.name}.{name}"] == pytest.approx(sparsity, abs=1e-6)


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_a_killed_run_with_owl_resumes_with_the_same_sparsities(
    method, dense, tmp_path, monkeypatch
):
    options = {"calibration": token_ids(), "allocation": "owl", "method": method}
    monkeypatch.setattr(allocate_sparsity, "_OUTLIER", 2)
    prunus.prune(dense, tmp_path / "whole", **options)
    monkeypatch.setattr(Memory, "spills", True)
    interrupt(prunus.prune, dense, tmp_path / "out", **options)
    kept = Manifest.load(tmp_path / "out").allocation
    monkeypatch.setattr(
        allocate_sparsity, "collect_statistics", lambda *a, **o: pytest.fail("measured twice")
    )
    assert prunus.prune(dense, tmp_path / "out", **options).allocation == kept
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


# --- a function of the user's own ---

OWN = """
def by_norm(statistics, sparsity, weight_of):
    means = {name: float(x.norms_I.mean()) for name, x in statistics.items()}
    middle = sorted(means.values())[len(means) // 2]
    assert all(weight_of(name).shape[1] == x.in_features for name, x in statistics.items())
    return {name: sparsity - 0.25 * (mean > middle) for name, mean in means.items()}
"""


def test_a_function_of_ones_own_gives_every_linear_its_sparsity(dense, tmp_path):
    """Given in Python or named as FILE.py:NAME, with all that it can ask for."""
    file, ids = tmp_path / "own.py", ids_file(tmp_path / "ids.safetensors")
    file.write_text(OWN)
    allocation = f"{file}:by_norm"
    flags = ("--allocation", allocation, "--calibration", ids, *WINDOWS)
    call("prune", dense, tmp_path / "file", *flags)
    record, options = Manifest.load(tmp_path / "file"), {"calibration": ids, "samples": 6}
    options["seqlen"] = 16
    found = sparsity_of(record)
    assert found == record.allocation and {*found.values()} == {0.25, 0.5}
    assert record.inputs.allocation_sha256
    # q, k and v have the same inputs, so they have the same norms.
    assert len({found[f"model.layers.0.self_attn.{x}_proj"] for x in "qkv"}) == 1

    def same(statistics):
        assert all(float(x.norms_I.min()) > 0 for x in statistics.values())
        return found

    given = prunus.prune(dense, tmp_path / "given", allocation=same, **options)
    assert given.recipe.allocation == "given:same" and given.allocation == found
    assert shards(tmp_path / "given") == shards(tmp_path / "file")
    file.write_text(OWN.replace("0.25", "0.125"))
    with pytest.raises(FileExistsError, match="another allocation_sha256"):
        prunus.prune(dense, tmp_path / "file", allocation=allocation, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: None, "must return a mapping .* returned a NoneType"),
        (lambda found: dict(list(found.items())[1:]), "'model.layers.0.self_attn.q_proj' has none"),
        (lambda found: found | {"lm_heat": 0.5}, "every linear .* 'lm_heat' is none"),
        (lambda found: found | {next(iter(found)): 1.0}, r"must lie in \[0, 1\); got 1"),
        (lambda found: found | {next(iter(found)): math.nan}, r"must lie in \[0, 1\); got nan"),
    ],
)
def test_sparsities_that_no_linear_can_have_are_refused(change, message, dense, tmp_path):
    def rule(statistics):
        return change(dict.fromkeys(statistics, 0.5))

    out, options = tmp_path / "out", {"allocation": rule, "calibration": IDS}
    assert_refused(ValueError, message, prunus.prune, dense, out, **options)


def test_a_rule_that_nobody_knows_is_refused_with_the_nearest():
    for wrong, message in (("owll", "did you mean owl"), ("own.py", "names a file but no alloc")):
        assert_refused(ValueError, message, Recipe, allocation=wrong)


def test_a_function_that_cannot_be_called_is_refused_before_any_work(dense, tmp_path):
    file, out = tmp_path / "own.py", tmp_path / "out"
    file.write_text("from math import fsum\n\ndef mine(statistics, power):\n    return {}\n")
    for name, message in (
        ("mine", "gets the statistics and, .* missing a required argument: 'power'$"),
        ("mne", r"own\.py has no mne: its allocations are mine\. .* did you mean mine\?$"),
        ("zzz", r"its allocations are mine\. Assign a function to zzz$"),
    ):
        options = {"calibration": IDS, "allocation": f"{file}:{name}"}
        assert_refused(ValueError, message, prunus.prune, dense, out, **options)
        assert not out.exists()
    assert_refused(ValueError, "option is `data`", prunus.prune, dense, out, data_dir=".")
