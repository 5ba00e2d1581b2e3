"""Sweeps: grid and cells, the same results as single commands, resuming, failures, refusals."""

import contextlib
import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prunus
from changes import edit_tensors, swap_two_tokens
from command_line import call
from places import REPOSITORY
from prunus.calibration.sources import find_source
from prunus.calibration.windows import WindowRequest
from prunus.document import Measured
from prunus.engine.run_options import RunOptions
from prunus.evaluation.eval_options import TaskOptions
from prunus.evaluation.eval_records import PerplexityResult
from prunus.evaluation.inspection import stored_size
from prunus.model.checkpoint.files import holds_figures
from prunus.model.open_folder import OpenFolder
from prunus.pruning.manifest import Manifest
from prunus.pruning.recipe import Recipe
from prunus.reporting.sweep_section import sweep_section
from prunus.sweeping import cells as sweep_cells
from prunus.sweeping.grid import Scoring, Sweep
from prunus.sweeping.results import CellResult, DenseResult, SweepResults, residual_gaps
from prunus.sweeping.sweep import check_sweep
from refusals import assert_refused
from stopping import timeless
from tiny import shards, weights
from tiny_tokenizer import byte_tokenizer, dense_checkpoint

pytestmark = pytest.mark.usefixtures("short_python_texts")

EXAMPLES = REPOSITORY / "examples"
SCORING = {"texts": ["python-docs"], "seqlen": 32, "samples": 4}
BASE = {"calibration": "python-docs", "samples": 3, "seqlen": 32}
#: More cells than anybody runs; they are refused before they are listed.
MANY = "\n".join(
    f"{name} = [{', '.join(map(str, range(1, 100)))}]"
    for name in ("samples", "seqlen", "seed", "batch", "reconstruct_epochs")
)
GRID = {"method": ["magnitude", "wanda"], "sparsity": [0.5, "2:4"]}


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A checkpoint with a tokenizer; no test writes to it."""
    return dense_checkpoint(tmp_path_factory.mktemp("sweep") / "dense")


def sweep_of(dense: Path, grid: dict = GRID, **keys) -> Sweep:
    values = {"models": [str(dense)], "recipe": BASE, "scoring": SCORING, "grid": [grid]}
    return Sweep.model_validate(values | keys)


def without_times(results: SweepResults) -> dict:
    return timeless(results.model_dump(mode="json"))


# --- the grid ---


def test_a_grid_spans_all_combinations_and_names_have_what_differs_from_the_recipe():
    sweep = Sweep.model_validate(
        {
            "models": ["models/My Model", "b"],
            "recipe": {"samples": 8, "sparsity": 0.6},
            "grid": [
                {"method": ["wanda", "magnitude"], "sparsity": [0.5, "2:4"], "seed": [0, 1]},
                {"method": "obs", "mask_from": "magnitude", "mask_order": ["before", "blockwise"]},
            ],
        }
    )
    cells = sweep.cells()
    assert len(cells) == 2 * (8 + 2)
    names = [cell.name for cell in cells]
    assert names[:4] == [
        "My_Model-wanda-0.5",
        "My_Model-wanda-0.5-seed=1",
        "My_Model-wanda-2of4",
        "My_Model-wanda-2of4-seed=1",
    ]
    assert names[9] == "My_Model-obs-0.6-mask_from=magnitude-mask_order=blockwise"
    assert {cell.recipe.samples for cell in cells} == {8}
    assert cells[2].recipe.n_of_m == (2, 4)
    assert cells[2].recipe.sparsity == 0.5
    own = Sweep(models=("m",), recipe={}, grid=({"method": "my/own.py:SQUARED"},)).cells()
    assert own[0].name == "m-SQUARED-0.5"
    grid = ({"sparsity": [0.3, "4:8"]},)
    replaced = Sweep(models=("m",), recipe={"pattern": "2:4"}, grid=grid).cells()
    shapes = [(cell.recipe.pattern, cell.recipe.sparsity) for cell in replaced]
    assert shapes == [("unstructured", 0.3), ("4:8", 0.5)]


def test_a_cell_of_two_grids_is_one_cell_and_recoveries_follow_it():
    sweep = Sweep.model_validate(
        {
            "models": ["m"],
            "grid": [
                {"sparsity": [0.5, 0.6], "recovery": "short"},
                {"sparsity": 0.5, "recovery": ["none", "short", "long"]},
            ],
            "recovery": {"short": {"mode": "lora"}, "long": {"mode": "masked"}},
        }
    )
    assert [(cell.name, cell.recovers) for cell in sweep.cells()] == [
        ("m-wanda-0.5", None),
        ("m-wanda-0.5+short", "m-wanda-0.5"),
        ("m-wanda-0.5+long", "m-wanda-0.5"),
        ("m-wanda-0.6", None),
        ("m-wanda-0.6+short", "m-wanda-0.6"),
    ]


AXES = {
    "method": st.sampled_from(["magnitude", "wanda", "sparsegpt"]),
    "sparsity": st.sampled_from([0.1, 0.5, 0.75, "1:4", "2:4", "4:8"]),
    "seed": st.integers(0, 3),
    "samples": st.integers(1, 3),
    "group": st.sampled_from(["row", "layer", 16]),
}


@settings(deadline=None, max_examples=40)
@given(
    st.fixed_dictionaries(
        {}, optional={k: st.lists(v, min_size=1, max_size=3, unique=True) for k, v in AXES.items()}
    )
)
def test_names_are_unique_and_stay_when_values_are_added(grid):
    def cells(table):
        return {c.name: c for c in Sweep(models=("m",), grid=(table,)).cells()}

    before = cells(grid)
    count = 1
    for values in grid.values():
        count *= len(values)
    assert len(before) == count
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._=-") for name in before)
    wider = {key: [*values, 0.9] if key == "sparsity" else values for key, values in grid.items()}
    after = cells(wider | {"dtype": ["auto", "float32"]})
    assert all(after[name].recipe == cell.recipe for name, cell in before.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = ", "is not valid TOML"),
        ('models = ["m"]', "grid is missing"),
        ("grid = []", "grid: "),
        ("model = 'm'\n[[grid]]", "unknown option 'model'; did you mean models?"),
        ("scoring = {text = ['c4']}\n[[grid]]", "'scoring.text'; did you mean texts?"),
        ("scoring = {seqlen = 1}\n[[grid]]", "scoring: seqlen must be at least 2"),
        ("[[grid]]", "no model: give models"),
        ("models = ['a/m', 'b/m']\n[[grid]]", "two models are called 'm' (a/m and b/m)"),
        ("MODEL[[grid]]\nmethods = ['wanda']", "cannot vary 'methods'; did you mean method?"),
        ("MODEL[[grid]]\npattern = ['2:4']", "grid 1 cannot vary 'pattern': patterns belong to"),
        ("MODEL[[grid]]\nignore = ['*.q']", "it belongs to [recipe]"),
        ("MODEL[[grid]]\nsparsity = []", "sparsity is an empty list"),
        ("MODEL[[grid]]\n[[grid]]\nsparsity = [1.5]", "grid 2: sparsity must lie in [0, 1)"),
        ("MODEL[[grid]]\nsparsity = ['2:x']", "pattern must be 'unstructured' or N:M"),
        ("MODEL[[grid]]\nmask_order = ['blockwise']", "belongs to method obs"),
        ("MODEL\nrecipe = {sample = 3}\n[[grid]]", "[recipe]: unknown option 'sample'"),
        ("MODEL[[grid]]\nrecovery = ['lora']", "recovery 'lora' has no table [recovery.lora]"),
        (".".join(["a"] * 20_000) + " = 1", "a key of more than sixteen parts"),
        ("x = {" + " . ".join(['"a"'] * 17) + " = 1}", "a key of more than sixteen parts"),
        ("[" + ".".join(["a"] * 17) + "]", "a key of more than sixteen parts"),
        ("x = " + "[" * 100_000, "is not valid TOML"),
        ("# " + "x" * 2**18, "at most 262,144 are read"),
        (f"MODEL[[grid]]\n{MANY}", "the grids have 9,509,900,499 cells"),
    ],
    ids=itertools.count(),
)
def test_a_sweep_file_with_a_fault_is_refused_by_name(text, message, tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text(text.replace("MODEL", "models = ['m']\n"))
    with pytest.raises(ValueError) as fault:
        Sweep.read(path, {})
    assert message in str(fault.value)
    assert str(path) in str(fault.value)


def test_models_of_the_command_line_replace_those_of_the_file(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text('title = "t"\nmodels = ["one"]\n[[grid]]\n')
    assert [cell.model for cell in Sweep.read(path, {"models": ("a/two", "three")}).cells()] == [
        "two",
        "three",
    ]
    assert_refused(
        FileNotFoundError, "there is no sweep file", Sweep.read, tmp_path / "none.toml", {}
    )


def test_the_examples_are_sweeps_that_pass_all_checks(dense, tmp_path):
    examples = {
        "table2": 9,
        "sparsity-curve": 24,
        "calibration-size": 8,
        "comparison-group": 15,
        "weight-update": 18,
        "lora": 8,
        "few-shot": 6,
        "llama-2-7b": 9,
    }
    for name, cells in examples.items():
        sweep = Sweep.read(EXAMPLES / f"{name}.toml", {"models": (str(dense),)})
        assert len(sweep.cells()) == cells
        # Those that reproduce the paper take C4 without BOS.
        asked = {(cell.recipe.calibration, cell.recipe.bos) for cell in sweep.cells()}
        assert sweep.scoring.bos == "no" and asked == {("c4", "no")}
        # The tiny model has 64 positions and Python's own text: only these are not the example's.
        small = {"recipe": sweep.recipe | BASE, "scoring": Scoring.model_validate(SCORING)}
        if name == "calibration-size":
            small["recipe"].pop("samples")
        results = check_sweep(sweep.model_copy(update=small), tmp_path / "out", RunOptions(), name)
        assert [cell.state for cell in results.cells] == ["waiting"] * cells
        assert not (tmp_path / "out").exists()


# --- running ---


@pytest.fixture(scope="module")
def swept(dense, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("swept") / "out"
    prunus.sweep(sweep_of(dense), folder)
    return folder


@pytest.fixture
def pruned(monkeypatch) -> list[str]:
    """The names of the cells that are pruned from here on."""
    names, run_verb = [], sweep_cells.run_verb

    def noted(command, session):
        names.append(command.output.parent.name)
        return run_verb(command, session)

    monkeypatch.setattr(sweep_cells, "run_verb", noted)
    return names


def test_cells_give_the_results_of_single_commands(dense, swept, tmp_path):
    results = SweepResults.load(str(swept))
    assert results.models["dense"].scores["python-docs"].perplexity == pytest.approx(
        prunus.perplexity(dense, "python-docs", seqlen=32, samples=4).perplexity, rel=1e-12
    )
    assert [cell.state for cell in results.cells] == ["done"] * 4
    assert results.models["dense"].size == stored_size(OpenFolder(dense))
    assert results.title == "Sweep of dense"
    for cell in results.cells:
        assert cell.size.bits_per_weight == 32
        recipe = cell.recipe
        shape = {"pattern": recipe.pattern} if recipe.n_of_m else {"sparsity": recipe.sparsity}
        manifest = prunus.prune(dense, tmp_path / cell.name, recipe.method, **shape, **BASE)
        expected = prunus.perplexity(
            tmp_path / cell.name, "python-docs", reference=dense, seqlen=32, samples=4
        )
        assert replace(cell.scores["python-docs"], seconds=0.0) == replace(expected, seconds=0.0)
        assert cell.pruning["zeros"] == manifest.totals["zeros"]
        assert cell.pruning["mean_removed_energy"] == manifest.totals["mean_removed_energy"]
        kept = Manifest.load(str(swept / "cells" / cell.name))
        assert kept.summary() | {"block_seconds": 0} == manifest.summary() | {"block_seconds": 0}
        assert kept.recipe == recipe


class Stopped(BaseException):
    """Works like a kill: nothing catches it."""


def stop_at_line(number: int) -> Callable[[str], None]:
    """What stops a sweep when it says its line of this number."""
    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        if len(said) == number:
            raise Stopped

    return stop


def test_cells_are_compared_with_the_dense_model_on_each_text_also_after_a_stop(dense, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog; " * 20)
    texts = ["python-docs", str(tmp_path / "text.txt")]
    grid = {"method": ["magnitude", "wanda"]}
    sweep, out = sweep_of(dense, grid, scoring={**SCORING, "texts": texts}), tmp_path / "out"
    with pytest.raises(Stopped):
        prunus.sweep(sweep, out, progress=stop_at_line(3))
    results = prunus.sweep(sweep, out)
    for cell in results.cells:
        for text in texts:
            found, base = cell.scores[text], results.models["dense"].scores[text]
            assert found.divergence.kl > 0
            assert found.divergence.reference_perplexity == base.perplexity


def test_cells_that_ask_for_the_same_windows_get_them(swept):
    wanted = WindowRequest(samples=3, seqlen=32, tokenizer=byte_tokenizer)
    expected = find_source("python-docs").draw(wanted)
    cells = SweepResults.load(swept).cells
    used = {cell.pruning["calibration_sha256"] for cell in cells if cell.recipe.method == "wanda"}
    assert used == {expected.sha256}
    looked_at_weights = [cell for cell in cells if cell.recipe.method == "magnitude"]
    assert not any("calibration" in cell.pruning for cell in looked_at_weights)


def test_weights_of_finished_cells_are_deleted_unless_they_are_kept(dense, swept, tmp_path):
    assert not list(swept.glob("cells/*/model"))
    assert len(list(swept.glob(f"cells/*/{Manifest.FILE}"))) == 4
    prunus.sweep(sweep_of(dense, {"method": "wanda"}, keep_checkpoints=True), tmp_path / "out")
    kept = weights(tmp_path / "out" / "cells" / "dense-wanda-0.5" / "model")
    assert (kept["model.layers.0.mlp.up_proj.weight"] == 0).float().mean() == 0.5


@pytest.mark.parametrize("lines", [1, 4])
def test_a_stopped_sweep_continues_to_the_same_results(lines, dense, swept, tmp_path, pruned):
    with pytest.raises(Stopped):
        prunus.sweep(sweep_of(dense), tmp_path / "out", progress=stop_at_line(lines))
    done = [cell.name for cell in SweepResults.load(tmp_path / "out").cells if cell.state == "done"]
    pruned.clear()
    again = prunus.sweep(sweep_of(dense), tmp_path / "out")
    assert not set(pruned) & set(done), "a finished cell is not started again"
    assert without_times(again) == without_times(SweepResults.load(swept))
    assert without_times(SweepResults.load(tmp_path / "out")) == without_times(again)


def test_a_finished_sweep_does_no_work(dense, swept, tmp_path, monkeypatch):
    shutil.copytree(swept, tmp_path / "out")
    monkeypatch.setattr(sweep_cells, "run_verb", None)
    monkeypatch.setattr(sweep_cells, "perplexity", None)
    said: list[str] = []
    prunus.sweep(sweep_of(dense), tmp_path / "out", progress=said.append)
    names = [name for name, _, _ in SweepResults.load(swept).every_model()]
    assert said == [f"keeps {', '.join(names)}"]
    assert (tmp_path / "out/results.json").read_bytes() == (swept / "results.json").read_bytes()


CHANGED = ("scored", "calibration", "weights", "tokenizer")
STOPS = ((2, True), (4, True), (4, False), (7, True), (99, True))
#: One change at each stop, and all changes after the end, where each keeps other figures.
FIRST = {(CHANGED[place % 4], *stop) for place, stop in enumerate(STOPS)} | {
    (changed, *STOPS[-1]) for changed in CHANGED
}


@pytest.mark.parametrize(
    ("changed", "lines", "stops"),
    [
        pytest.param(changed, *stop, marks=() if (changed, *stop) in FIRST else pytest.mark.slow)
        for changed, stop in itertools.product(CHANGED, STOPS)
    ],
)
def test_no_figure_stays_of_a_text_or_a_model_that_changed(changed, lines, stops, dense, tmp_path):
    """It changes when a sweep says its line of this number, which goes on or stops; or later."""
    model, out = shutil.copytree(dense, tmp_path / "dense"), tmp_path / "out"
    files = {name: tmp_path / f"{name}.txt" for name in ("scored", "calibration")}
    for file in files.values():
        file.write_text("The quick brown fox jumps over the lazy dog; " * 20)
    sweep = sweep_of(
        model,
        {"method": ["magnitude", "wanda"]},
        recipe=BASE | {"calibration": str(files["calibration"])},
        scoring=SCORING | {"texts": ["python-docs", str(files["scored"])]},
        keep_checkpoints=lines == 7,
    )

    def change() -> None:
        if changed == "weights":
            edit_tensors(model, lambda held: held["model.layers.1.mlp.up_proj.weight"].mul_(2))
        elif changed == "tokenizer":
            swap_two_tokens(model)
        else:
            files[changed].write_text("Pack my box with five dozen liquor jugs. " * 20)

    stop = stop_at_line(lines)

    def note(line: str) -> None:
        try:
            stop(line)
        except Stopped:
            change()
            if stops:
                raise

    with contextlib.suppress(Stopped, ValueError):
        prunus.sweep(sweep, out, progress=note)
    if lines == 99:
        change()
    said: list[str] = []
    again = prunus.sweep(sweep, out, progress=said.append)
    fresh = prunus.sweep(sweep, tmp_path / "fresh")
    assert without_times(again) == without_times(fresh)
    kept, new = (sorted(folder.glob("cells/*/model")) for folder in (out, tmp_path / "fresh"))
    assert [*map(shards, kept)] == [*map(shards, new)]
    if lines == 99:
        names = ["dense-dense", "dense-magnitude-0.5", "dense-wanda-0.5"]
        stay = names[:2] if changed == "calibration" else []
        assert said[: bool(stay)] == [f"keeps {', '.join(stay)}"] * bool(stay)
        made = " ".join(line for line in said if line.startswith("measures again (another "))
        assert all((name in made) == (name not in stay) for name in names)


@pytest.mark.parametrize("changed", ["text", "calibration"])
def test_a_recovery_is_made_again_if_its_text_or_what_it_recovers_has_changed(
    changed, dense, tmp_path
):
    files = {name: tmp_path / f"{name}.txt" for name in ("text", "calibration")}
    for file in files.values():
        file.write_text("The quick brown fox jumps over the lazy dog; " * 40)
    short = {"mode": "masked", "teacher": "dense", "text": str(files["text"]), "tokens": 2048}
    short |= {"seqlen": 32, "held_out": 2, "evaluations": 1}
    recipe = BASE | {"calibration": str(files["calibration"])}
    grid = {"method": ["magnitude", "wanda"], "recovery": ["short"]}
    sweep = sweep_of(dense, grid, recipe=recipe, recovery={"short": short})
    first, said = prunus.sweep(sweep, tmp_path / "out"), []
    files[changed].write_text("Pack my box with five dozen liquor jugs. " * 40)
    again = prunus.sweep(sweep, tmp_path / "out", progress=said.append)
    assert without_times(again) == without_times(prunus.sweep(sweep, tmp_path / "fresh"))
    kept = [cell == before for cell, before in zip(again.cells, first.cells, strict=True)]
    assert kept == {"text": [True, False] * 2, "calibration": [True] * 2 + [False] * 2}[changed]
    if changed == "calibration":
        assert any("dense-wanda-0.5 is made again): dense-wanda-0.5+short" in x for x in said)


def test_failures_are_recorded_and_tried_again(dense, swept, tmp_path, monkeypatch):
    original = sweep_cells.perplexity

    def faulty(model, *arguments, **options):
        if "wanda-0.5" in str(model):
            raise RuntimeError("no luck\nthis time")
        return original(model, *arguments, **options)

    monkeypatch.setattr(sweep_cells, "perplexity", faulty)
    said: list[str] = []
    results = prunus.sweep(sweep_of(dense), tmp_path / "out", progress=said.append)
    assert {cell.name: cell.state for cell in results.cells} == {
        "dense-magnitude-0.5": "done",
        "dense-magnitude-2of4": "done",
        "dense-wanda-0.5": "failed",
        "dense-wanda-2of4": "done",
    }
    assert results.cells[2].error == "RuntimeError: no luck this time"
    assert "[3/4] dense-wanda-0.5: failed: RuntimeError: no luck this time" in said
    assert results.cells[0].residual_gap == {"python-docs": None}, "no Wanda to compare with yet"
    monkeypatch.setattr(sweep_cells, "perplexity", original)
    again = prunus.sweep(sweep_of(dense), tmp_path / "out")
    assert without_times(again) == without_times(SweepResults.load(swept))


def test_without_a_dense_baseline_no_cell_is_pruned(dense, tmp_path, monkeypatch):
    def faulty(*arguments, **options):
        raise OSError("the disk is full")

    monkeypatch.setattr(sweep_cells, "perplexity", faulty)
    monkeypatch.setattr(sweep_cells, "run_verb", None)
    results = prunus.sweep(sweep_of(dense), tmp_path / "out")
    assert results.models["dense"].error == "the disk is full"
    assert {cell.state for cell in results.cells} == {"failed"}
    assert all("the dense model dense could not be scored" in cell.error for cell in results.cells)


def test_cells_can_be_added_and_nothing_else_changed(dense, swept, tmp_path, pruned):
    out = tmp_path / "out"
    shutil.copytree(swept, out)
    before = (out / "results.json").read_bytes()
    other = dense_checkpoint(tmp_path / "other" / "dense", num_hidden_layers=1)
    for changed, message in (
        (sweep_of(dense, {**GRID, "method": "wanda"}), "another set of cells"),
        (sweep_of(dense, scoring=SCORING | {"samples": 5}), "another scoring.samples (4, now 5)"),
        (
            sweep_of(dense, recipe=BASE | {"samples": 4}),
            "another samples in cell dense-magnitude-0.5 (3, now 4)",
        ),
        (sweep_of(other), "another checkpoint dense"),
        (sweep_of(dense, models=[str(other.parent)]), "config.json"),
    ):
        with pytest.raises((FileExistsError, FileNotFoundError)) as fault:
            prunus.sweep(changed, out)
        assert message in str(fault.value)
        assert (out / "results.json").read_bytes() == before
    assert not pruned
    results = json.loads(before)
    results["models"]["dense"].pop("weights_sha256")  # as version 0.4 wrote it
    (out / "results.json").write_text(json.dumps(results))
    assert_refused(FileExistsError, "of an earlier version", prunus.sweep, sweep_of(dense), out)
    (out / "results.json").write_bytes(before)
    wider = prunus.sweep(
        sweep_of(dense, {**GRID, "sparsity": [0.75, 0.5, "2:4"]}, title="another"), out
    )
    assert pruned == ["dense-magnitude-0.75", "dense-wanda-0.75"]
    assert wider.title == "another"
    earlier = {cell.name: cell for cell in SweepResults.load(swept).cells}
    assert all(
        cell.model_copy(update={"residual_gap": {}})
        == earlier[cell.name].model_copy(update={"residual_gap": {}})
        for cell in wider.cells
        if cell.name in earlier
    )


def test_the_report_says_where_cells_got_other_windows(swept):
    results = SweepResults.load(swept)
    assert "other cells" not in str(sweep_section(results))
    wanda = next(cell for cell in results.cells if cell.recipe.method == "wanda")
    wanda.pruning["calibration_sha256"] = "0" * 64  # as if the text had been another one
    assert "in other cells" in str(sweep_section(results)) and "0" * 12 in str(
        sweep_section(results)
    )


def test_recoveries_share_one_pruned_model_and_can_be_added(dense, tmp_path, pruned):
    pytest.importorskip("peft")
    out = tmp_path / "out"
    short = {"text": "python-docs", "tokens": 2048, "seqlen": 32, "held_out": 2, "evaluations": 1}
    recovery = {
        "adapter": {"mode": "lora", **short},
        "tuned": {"mode": "masked", "teacher": "dense", **short},
    }
    grid = {"method": "wanda", "sparsity": 0.5, "recovery": "adapter"}
    first = prunus.sweep(sweep_of(dense, grid, recovery=recovery), out)
    assert len(pruned) == 1
    both = prunus.sweep(
        sweep_of(dense, {**grid, "recovery": ["adapter", "tuned"]}, recovery=recovery), out
    )
    assert len(pruned) == 2, "its weights were gone, and are made again for the second recovery"
    assert [(cell.name, cell.state, cell.error) for cell in both.cells] == [
        ("dense-wanda-0.5", "done", None),
        ("dense-wanda-0.5+adapter", "done", None),
        ("dense-wanda-0.5+tuned", "done", None),
    ]
    assert both.cells[:2] == first.cells
    assert both.cells[2].recovered["sparsity"] == 0.5
    assert both.cells[1].recovered["added_parameters"] > 0
    assert not list(out.glob("cells/*/model"))
    changed = {**recovery, "tuned": {**recovery["tuned"], "tokens": 1024}}
    with pytest.raises(FileExistsError, match=r"another recovery\.tuned"):
        prunus.sweep(
            sweep_of(dense, {**grid, "recovery": ["adapter", "tuned"]}, recovery=changed), out
        )
    with pytest.raises(ValueError, match=r"recovery\.adapter: unknown option 'token'"):
        prunus.sweep(
            sweep_of(dense, grid, recovery={"adapter": {"mode": "lora", "token": 3}}),
            tmp_path / "none",
        )


def test_tasks_are_checked_scored_and_stored_with_their_errors(dense, tmp_path, monkeypatch):
    checked = []
    values = {"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": None}
    of_lm_eval = {"results": {"boolq": values}, "task_hashes": {"boolq": "sha"}}

    def evaluate(model, tasks, *, progress, **options):
        asked = TaskOptions.read(None, options)
        assert (tasks, asked.limit, asked.fewshot) == (("boolq",), 2, None)
        return of_lm_eval | {"samples": {"boolq": []}}

    monkeypatch.setattr(
        "prunus.sweeping.sweep.prepare_tasks",
        lambda models, tasks, **_: checked.append(([*map(str, models)], tasks)),
    )
    monkeypatch.setattr(sweep_cells, "evaluate", evaluate)
    sweep = sweep_of(
        dense, {"method": "magnitude"}, scoring={"texts": [], "tasks": ["boolq"], "limit": 2}
    )
    prunus.sweep(sweep, tmp_path / "out")
    assert checked == [([str(dense)], ("boolq",))]
    results = SweepResults.load(tmp_path / "out")
    assert results.model_dump()["cells"][0]["tasks"] == of_lm_eval
    assert results.model_dump()["models"]["dense"]["tasks"] == of_lm_eval
    titles = [column.title for column in results.table().columns]
    assert [row[titles.index("boolq, acc")] for row in results.table().rows] == [
        Measured(0.5, 0.1)
    ] * 2
    with monkeypatch.context() as patched:
        patched.setattr(sweep_cells, "evaluate", None)
        prunus.sweep(sweep, tmp_path / "out")  # nothing is left to do
    of_lm_eval["task_hashes"] = {"boolq": "other"}
    wider = sweep.model_copy(update={"grid": ({"method": ["magnitude", "wanda"]},)})
    assert "rows or prompts" in prunus.sweep(wider, tmp_path / "out").cells[1].error
    monkeypatch.setattr("prunus.sweeping.sweep.installed_version", lambda name: "another")
    again = prunus.sweep(wider, tmp_path / "out")
    assert len(again.changed) == 3
    assert {cell.tasks["task_hashes"]["boolq"] for cell in again.cells} == {"other"}


# --- the residual gap ---


def made(name: str, perplexity: float | None, **recipe) -> CellResult:
    score = PerplexityResult(
        source="s",
        perplexity=math.inf if perplexity is None else perplexity,
        loss=1.0,
        windows=1,
        tokens=2,
        seqlen=2,
        protocol="p",
        seconds=0.0,
        bos="no",
    )
    return CellResult(
        name=name, model="m", recipe=Recipe(**recipe), state="done", scores={"text": score}
    )


def results_of(dense: float, *cells: CellResult) -> SweepResults:
    model = DenseResult(path="m", fingerprint="f", scores=made("", dense).scores)
    scoring = {"texts": ["text"]}
    return SweepResults(
        file="f",
        title="t",
        scoring=scoring,
        hardware={},
        versions={},
        models={"m": model},
        cells=[*cells],
    )


def test_the_residual_gap_compares_to_wanda_under_the_same_conditions():
    wanda = made("w", 30.0)
    cells = {
        "wanda": (wanda, 1.0),
        "halved": (made("a", 25.0, method="sparsegpt"), 0.5),
        "worse": (made("b", 60.0, method="magnitude", group="row"), 4.0),
        "better than dense": (
            made("c", 18.0, method="obs", mask_order="blockwise", damping=0.1),
            -0.2,
        ),
        "by layer": (made("d", 40.0, group="layer"), 2.0),
        "recovered": (made("e", 22.0).model_copy(update={"recovery": "lora"}), 0.2),
        "another sparsity": (made("f", 25.0, sparsity=0.6, method="sparsegpt"), None),
        "another pattern": (made("g", 25.0, pattern="2:4", method="sparsegpt"), None),
        "another seed": (made("h", 25.0, seed=1, method="sparsegpt"), None),
        "infinite": (made("i", None, method="magnitude"), None),
    }
    results = results_of(20.0, *(cell for cell, _ in cells.values()))
    for name, (cell, expected) in cells.items():
        assert residual_gaps(results, cell) == {"text": pytest.approx(expected)}, name
    lossless = results_of(29.9, *(cell for cell, _ in cells.values()))
    assert residual_gaps(lossless, cells["halved"][0]) == {"text": None}, "Wanda loses too little"


def test_results_that_are_damaged_or_missing_are_named(swept, tmp_path):
    assert_refused(FileNotFoundError, r"has no results\.json", SweepResults.load, tmp_path)
    content = json.loads((swept / "results.json").read_text())
    content["cells"][0]["state"] = "lost"
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert_refused(
        ValueError, r"damaged or of another version: cells\.0\.state", SweepResults.load, tmp_path
    )


# --- the command ---


def write_toml(path: Path, dense: Path) -> Path:
    path.write_text(
        f"models = [{json.dumps(str(dense))}]\n"
        '[recipe]\ncalibration = "python-docs"\nsamples = 2\nseqlen = 16\n'
        '[scoring]\ntexts = ["python-docs"]\nseqlen = 16\nsamples = 2\n'
        '[[grid]]\nmethod = ["magnitude"]\nsparsity = [0.5]\n'
    )
    return path


def test_the_command_checks_runs_and_shows(dense, tmp_path):
    file, out = write_toml(tmp_path / "s.toml", dense), tmp_path / "out"
    checked = call("sweep", file, out, "--check").stdout
    assert "would run" in checked
    assert "done" not in checked
    assert "Nothing was run or written" in checked
    assert not out.exists()
    result = call("sweep", file, out, "--json", tmp_path / "copy.json")
    assert "dense-magnitude-0.5" in result.stdout
    assert "perplexity on python-docs" in result.stderr
    assert holds_figures(tmp_path / "copy.json") and not holds_figures(out / "results.json")
    assert json.loads((tmp_path / "copy.json").read_text()) == json.loads(
        (out / "results.json").read_text()
    )
    assert json.loads((out / "results.json").read_text())["file"] == "s.toml"


def test_the_command_fails_where_a_cell_failed(dense, tmp_path, monkeypatch):
    def faulty(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(sweep_cells, "run_verb", faulty)
    result = call("sweep", write_toml(tmp_path / "s.toml", dense), tmp_path / "out", status=1)
    assert "1 of 1 cells failed" in result.stderr
    assert "error" not in result.stderr
    assert "MemoryError: no message" in result.stdout


OWN = """
from typing import Annotated
from prunus.methods import Method, MethodOptions, keep_mask, masked
from prunus.model.open_folder import OpenFolder
from prunus.options import Option

class OwnOptions(MethodOptions):
    power: Annotated[float, Option("Raise the norms.")] = 1.0

def prune(weight_OI, statistics, work):
    score_OI = weight_OI.abs() * statistics.norms_I ** work.options.power
    return masked(weight_OI, keep_mask(score_OI, work.pattern, work.sparsity))

OWN = Method(name="mine", summary="", function=prune, needs="norms", options=OwnOptions)
"""


def test_reports_name_a_method_of_ones_own_and_have_the_output_error_of_every_method(
    dense, tmp_path
):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    own = f"\n[[grid]]\nmethod = {json.dumps(f'{file}:OWN')}\npower = [0.5, 2.0]\n"
    grid, out = write_toml(tmp_path / "s.toml", dense), tmp_path / "out"
    text = grid.read_text().replace('"magnitude"', '"wanda", "sparsegpt"')
    grid.write_text(text + own)
    call("sweep", grid, out, "--measure-error")
    results = SweepResults.load(out)
    assert [row["method"] for row in results.rows()][1:] == ["wanda", "sparsegpt", "mine", "mine"]
    assert [row.get("power") for row in results.rows()][3:] == [0.5, 2.0]
    errors = [row["relative output error"] for row in results.rows()[1:]]
    assert all(0 < error < 1 for error in errors) and errors[1] < errors[0]
    assert {row["removed energy"] for row in results.rows()} == {None}
    [shown] = [p for p in sweep_section(results).parts if p.title.startswith("Perplexity on")][:1]
    assert [row[0] for row in shown.rows] == [
        "dense", "wanda", "sparsegpt", "mine, power 0.5", "mine, power 2.0"
    ]  # fmt: skip
    assert "mine" not in [column.title for column in results.table().columns]
    assert "power" not in [column.title for column in results.table().columns]


def test_a_sweep_of_several_processes_is_refused_before_any_work(dense, tmp_path, monkeypatch):
    for name, value in zip(
        ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"), ("0", "2", "here", "1"), strict=True
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="a sweep runs in one process"):
        prunus.sweep(write_toml(tmp_path / "s.toml", dense), tmp_path / "out")
    assert not (tmp_path / "out").exists()
