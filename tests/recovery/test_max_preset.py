"""Preset max: best, then a training of all kept weights, as one run that resumes in both phases."""

import contextlib
import json
import os
import shutil

import pytest
import torch

import prunus
from changes import edit_tensors
from command_line import call
from prunus.engine.run_options import RunOptions
from prunus.model.checkpoint.tensor_files import INDEX_NAME
from prunus.model.loading import load_model
from prunus.pruning.manifest import Manifest
from prunus.recovery.max_preset import PRUNED, max_run, training_options
from prunus.recovery.recovery_record import RecoveryRecord
from recovery_cases import StopError, shards, stop_at
from refusals import assert_refused
from scripts import run_script
from stopping import assert_all_resumed, interrupt, stop_after


def options(text, **changes):
    windows = {"calibration": str(text), "samples": 6, "seqlen": 16, "dtype": "float32"}
    return windows | {"tokens": 8192} | changes


#: A pruning that takes no time.
QUICK = {"method": "wanda", "dense_weight": 0, "reconstruct": "none", "allocation": "uniform"}


@pytest.fixture(scope="module")
def finished(dense, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("max") / "finished"
    return out, *prunus.prune_and_recover(dense, out, **options(text, pattern="2:4"))


def test_the_result_is_pruned_checkpoint_with_its_zeros_and_both_records(finished, dense):
    out, manifest, record = finished
    assert manifest.recipe.preset == "best"
    assert json.loads((out / Manifest.FILE).read_text()) == manifest.model_dump(mode="json")
    assert json.loads((out / RecoveryRecord.FILE).read_text()) == record.model_dump(mode="json")
    assert not (out / PRUNED).exists()
    state = load_model(out, torch.float32).state_dict()
    kept = {name: state[f"{name}.weight"].view(-1, 4) != 0 for name in record.linears}
    assert kept and all(int(groups.sum(1).max()) <= 2 for groups in kept.values())
    assert record.totals["sparsity"] >= 0.5
    # Norms and embeddings are trained too, and the dense model teaches.
    before, after = (load_model(path, torch.float32).state_dict() for path in (dense, out))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("norm" in name for name in moved) and any("embed" in name for name in moved)
    assert record.teacher == record.source == str(dense)
    assert record.recipe.distill_weight == 1
    assert record.best and record.evaluations[record.best].held_out_loss < (
        record.evaluations[0].held_out_loss
    )


def test_a_plan_names_the_training_and_the_memory_of_its_models(dense, text, tmp_path):
    windows = ["--calibration", text, "--samples", 6, "--seqlen", 16]
    shown = call("plan", dense, tmp_path / "new", "--preset", "max", *windows, "--json", "-")
    stored = sum(tensor.nbytes for tensor in load_model(dense).state_dict().values())
    assert not (tmp_path / "new").exists()
    # 16 bytes for each parameter of the student, and the dense model in its float32.
    assert json.loads(shown.stdout)["training"] == {
        "minutes": 20.0,
        "text": str(text),
        "seqlen": 16,
        "batch": 64,
        "memory_bytes": 4 * stored + stored,
    }


def test_the_same_call_again_does_nothing_and_another_one_is_refused(finished, dense, text):
    out, manifest, record = finished
    before = shards(out)
    again = prunus.prune_and_recover(dense, out, **options(text, pattern="2:4"))
    assert again == (manifest, record)
    # A kill during the removal of the pruned checkpoint leaves a part of it.
    shutil.copytree(out, out / PRUNED, ignore=shutil.ignore_patterns("*.safetensors"))
    prunus.prune_and_recover(dense, out, **options(text, pattern="2:4"))
    assert not (out / PRUNED).exists()
    for change, word in (
        ({"tokens": 4096}, "tokens"),
        ({"pattern": "4:8"}, "pattern"),
        ({"seed": 3}, "seed"),
    ):
        with pytest.raises(FileExistsError, match=word):
            prunus.prune_and_recover(dense, out, **(options(text, pattern="2:4") | change))
    assert shards(out) == before
    assert not (out / PRUNED).exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_run_killed_in_either_phase_resumes_to_the_same_bytes(dense, text, tmp_path):
    results = run_script("random_kills.py", dense.parent, tmp_path, 0, "max/9")["max"]
    found = [set(result["found"]) for result in results]
    assert any("training.safetensors" in names for names in found), "some in the training"
    in_pruning = [names for names in found if RecoveryRecord.FILE not in names]
    assert any(".prunus-pruned" in names for names in in_pruning), "and some in the pruning"
    assert_all_resumed(results)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"minutes": 5}, ValueError, "in tokens or in minutes, not in both"),
        ({"tokens": 0}, ValueError, "tokens must be at least 1"),
        ({"samples": 2, "seqlen": 512}, ValueError, "windows of 512 tokens do not fit"),
        ({"resume": True}, FileNotFoundError, "no unfinished run"),
        ({"preset": "max"}, ValueError, "more than a recipe"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_pruned(
    changes, error, message, dense, text, tmp_path
):
    with pytest.raises(error, match=message):
        prunus.prune_and_recover(dense, tmp_path / "out", **options(text, **changes))
    assert not list(tmp_path.iterdir())


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def test_only_the_folder_of_the_result_is_written(dense, text, tmp_path):
    """Not the folder OUT-pruned, nor one that a link leads to, even with `overwrite`."""
    out, beside = tmp_path / "out", tmp_path / "out-pruned"
    windows = {k: x for k, x in options(text, **QUICK).items() if k != "tokens"}
    interrupt(prunus.prune, dense, beside, **windows)
    before = content(beside)
    prunus.prune_and_recover(dense, out, **options(text, **QUICK))
    assert content(beside) == before, "an unfinished run"
    shutil.rmtree(out)
    prunus.prune(dense, beside, **windows)
    before = content(beside)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no result of prunus recover"):
        prunus.prune_and_recover(dense, out, **options(text), overwrite=True)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    (out / PRUNED).symlink_to(beside)
    with pytest.raises(FileExistsError, match="is a link"):
        prunus.prune_and_recover(dense, out, **options(text), overwrite=True)
    (out / PRUNED).unlink()
    prunus.prune_and_recover(dense, out, **options(text, **QUICK), overwrite=True)
    assert content(beside) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-pruned"]


def test_an_unfinished_run_is_no_model_and_belongs_to_this_preset(dense, text, tmp_path):
    out, chosen = tmp_path / "out", options(text, **QUICK)

    def stop(_):
        raise StopError

    with pytest.raises(StopError):
        prunus.prune_and_recover(dense, out, **chosen, pruning_progress=stop)
    assert [path.name for path in out.iterdir()] == [PRUNED]
    assert_refused(FileNotFoundError, r"no config\.json", load_model, out)
    windows = {name: x for name, x in chosen.items() if name != "tokens"}
    with pytest.raises(FileExistsError, match="holds no result of prunus prune"):
        prunus.prune(dense, out, **windows, overwrite=True)
    with pytest.raises(FileExistsError, match="unfinished run"):
        prunus.prune_and_recover(dense, out, **chosen, resume=False)
    with pytest.raises(StopError):
        prunus.prune_and_recover(dense, out, **chosen, resume=True, training_progress=stop)
    _, record = prunus.prune_and_recover(dense, out, **chosen, resume=True)
    assert record.state == "finished" and not (out / PRUNED).exists()
    # Another run with `overwrite` begins with the pruning, inside the same folder.
    assert_refused(
        FileExistsError, "another seed", prunus.prune_and_recover, dense, out, **chosen, seed=1
    )
    manifest, _ = prunus.prune_and_recover(dense, out, **chosen, seed=1, overwrite=True)
    assert manifest.recipe.seed == 1 and not (out / PRUNED).exists()


@contextlib.contextmanager
def stop_at_once():
    raise StopError
    yield


@pytest.mark.parametrize(
    ("phase", "name", "message"),
    [
        ("first block", "model.norm.weight", r"another tensor model\.norm\.weight"),
        ("first block", "model.layers.0.mlp.up_proj.weight", r"layers\.0 of .* is not what it was"),
        ("pruned", "model.layers.1.mlp.up_proj.weight", r"layers\.1 of .* is not what it was"),
        ("training", "model.embed_tokens.weight", r"another tensor model\.embed_tokens"),
    ],
)
def test_a_model_that_changed_since_is_refused(phase, name, message, dense, text, tmp_path):
    model, out = shutil.copytree(dense, tmp_path / "model"), tmp_path / "out"
    chosen = options(text, **QUICK)
    recipe = {"preset": "best"} | {key: x for key, x in chosen.items() if key != "tokens"}
    read = prunus.Recipe.read(None, recipe)
    pruning = contextlib.nullcontext({"report": stop_after(1) if phase == "first block" else None})
    training = contextlib.nullcontext({"report": stop_at(0)})
    shown = (pruning, stop_at_once() if phase == "pruned" else training)
    with contextlib.suppress(StopError):
        max_run(model, out, read, RunOptions(), shown, {"tokens": 8192})
    edit_tensors(model, lambda tensors: tensors[name].mul_(1.5))
    assert_refused(FileExistsError, message, prunus.prune_and_recover, model, out, **chosen)


def test_the_training_follows_the_recipe():
    recipe = prunus.Recipe(calibration="ptb", seqlen=2048, seed=4, bos="no", dtype="float16")
    chosen = training_options(recipe, tokens=4096)
    assert (chosen.text, chosen.seqlen, chosen.seed, chosen.bos) == ("ptb", 512, 4, "no")
    assert (chosen.dtype, chosen.tokens, chosen.minutes) == ("auto", 4096, None)
    assert chosen.batch == 2 and training_options(recipe, tokens=4096, processes=4).batch == 4


def test_the_command_line_shows_both_phases(dense, text, tmp_path):
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    arguments = (
        "prune", dense, out, "--preset", "max", "--tokens", 8192, "--calibration", text,
        "--samples", 6, "--seqlen", 16, "--dtype", "float32",
    )  # fmt: skip
    result = call(*arguments, "--json", figures)
    shown = " ".join(result.stdout.split())
    assert "the result" in shown and "compared weight by weight" in shown and "alps" in shown
    assert "held-out perplexity" in result.stderr and "pruned in" in result.stderr
    written = json.loads(figures.read_text())
    assert written["pruning"] == json.loads((out / Manifest.FILE).read_text())
    assert written["recovery"] == json.loads((out / RecoveryRecord.FILE).read_text())
    assert (out / INDEX_NAME).exists()
    assert "nothing was done now" in call(*arguments).stderr
