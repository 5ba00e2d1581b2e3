"""A killed recovery resumes to the same weights; a different one leaves the folder alone.

Models and texts that change during the work, or before it is resumed, end it.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from changes import edit_json, edit_tensors
from prunus.model.checkpoint.tensor_files import INDEX_NAME
from prunus.recovery.recovery_record import Evaluation
from prunus.training.checkpoints import Checkpoints, TrainingState
from recovery_cases import recover, shards, stop_at
from refusals import assert_refused
from scripts import run_script
from stopping import assert_all_resumed, interrupt


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_recovery_killed_at_any_rename_resumes_to_the_same_bytes(pruned, text, tmp_path):
    kills = ["recover-masked/1", "recover-lora/3"]
    results = run_script("random_kills.py", pruned.parent, tmp_path, 0, *kills)
    found = {
        mode: {name for result in results[mode] for name in result["found"]} for mode in results
    }
    assert "training.safetensors" in found["recover-masked"] & found["recover-lora"]
    assert len({name for name in found["recover-masked"] if name.startswith("best-")}) >= 2
    assert "model-00001-of-00003.safetensors" in found["recover-masked"]
    for killed in results.values():
        assert len(killed) >= 4
        assert_all_resumed(killed)


def test_training_resumes_from_its_last_checkpoint(pruned, text, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    expected = recover(pruned, whole, "masked", text)
    assert_refused(
        FileNotFoundError, "no unfinished run", recover, pruned, out, "masked", text, resume=True
    )
    interrupt(recover, pruned, out, "masked", text, progress=stop_at(0.6))
    assert not (out / INDEX_NAME).exists(), "a half-finished folder is no model"
    assert_refused(
        FileExistsError, "unfinished run", recover, pruned, out, "masked", text, resume=False
    )
    seen = []
    record = recover(pruned, out, "masked", text, resume=True, progress=seen.append)
    assert seen[0].message == "resumed at step 10"
    assert [entry.step for entry in record.evaluations] == [0, 5, 10, 15, 20]
    assert shards(out) == shards(whole)
    assert [e.held_out_loss for e in record.evaluations] == [
        e.held_out_loss for e in expected.evaluations
    ]


def test_a_state_without_its_best_weights_is_not_resumed(pruned, text, tmp_path):
    interrupt(recover, pruned, tmp_path / "out", "masked", text, progress=stop_at(0.6))
    for path in (tmp_path / "out").glob("best-*"):
        path.unlink()
    assert (tmp_path / "out" / "training.safetensors").exists()
    assert Checkpoints(tmp_path / "out").load_state({}, None) is None
    recover(pruned, tmp_path / "out", "masked", text)
    recover(pruned, tmp_path / "whole", "masked", text)
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_a_finished_recovery_is_not_done_again(pruned, text, tmp_path, monkeypatch):
    first = recover(pruned, tmp_path / "out", "lora", text)
    before = shards(tmp_path / "out")
    monkeypatch.setattr("prunus.recovery.recover.Training", None)
    assert recover(pruned, tmp_path / "out", "lora", text) == first
    assert shards(tmp_path / "out") == before


def test_another_recovery_replaces_a_folder_only_if_asked_to(dense, pruned, text, tmp_path):
    """And completely: files that an adapter left would make a checkpoint look like an adapter."""
    out = tmp_path / "out"
    recover(pruned, out, "lora", text)
    recover(pruned, out, "masked", text, overwrite=True, tokens=64)
    assert not list(out.glob("adapter*"))
    before = shards(out)
    for change in ({"tokens": 320}, {"seed": 1}, {"teacher": dense}):
        with pytest.raises(FileExistsError, match=f"another {next(iter(change))}"):
            recover(pruned, out, "masked", text, **({"tokens": 64} | change))
    assert shards(out) == before
    recover(pruned, out, "lora", text, overwrite=True)
    assert list(shards(out)) == ["adapter_model.safetensors"]
    assert not (out / "config.json").exists()


def _edited(path, change):
    tensors, metadata = load_file(path), None
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def _first(tensors, start="weight/"):
    return next(name for name in tensors if name.startswith(start))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(b""),
        lambda path: save_file({}, path),
        lambda path: _edited(path, lambda t, m: m.update(state="{}")),
        lambda path: _edited(path, lambda t, m: m.update(state="[" * 100_000)),
        lambda path: _edited(path, lambda t, m: t.pop(_first(t))),
        lambda path: _edited(path, lambda t, m: t.update({"weight/unknown": torch.ones(1)})),
        lambda path: _edited(path, lambda t, m: t.update({_first(t): torch.ones(1)})),
        lambda path: _edited(path, lambda t, m: t.update({_first(t, "exp_avg/"): torch.ones(1)})),
        lambda path: _edited(path, lambda t, m: t[_first(t)].fill_(float("nan"))),
    ],
)
def test_a_damaged_state_is_named_and_changes_nothing(damage, tmp_path):
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    start = Evaluation(step=0, tokens=0, seconds=0.0, training_loss=None, held_out_loss=1.0)
    state = TrainingState(evaluations=[start])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {"a": weight}, optimizer)
    assert checkpoints.load_state({"a": weight}, optimizer) == state
    damage(tmp_path / "training.safetensors")
    before = weight.detach().clone()
    with pytest.raises(ValueError, match=r"training\.safetensors is damaged .*overwrite"):
        checkpoints.load_state({"a": weight}, optimizer)
    assert torch.equal(weight, before)
    (tmp_path / "best-00000000.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"best-00000000\.safetensors is damaged"):
        checkpoints.load_best(state, {"a": weight})


# --- models and texts that change ---


def models(dense, pruned, tmp_path):
    """Copies of both models that a test may change."""
    return {
        "student": shutil.copytree(pruned, tmp_path / "student"),
        "teacher": shutil.copytree(dense, tmp_path / "teacher"),
    }


def train(folders, output, text, **options):
    return recover(
        folders["student"], output, "masked", text, teacher=folders["teacher"], **options
    )


def shard(folder):
    """The file with everything outside the blocks."""
    shards = sorted(folder.glob("*.safetensors"))
    return shards[-1]


def with_another_norm(folder):
    """The header stays, and so does every block."""
    edit_tensors(shard(folder), lambda tensors: tensors["model.norm.weight"].mul_(2))


def cut_short(folder):
    """A mapped file would now kill the process that reads it."""
    with open(shard(folder), "r+b") as file:
        file.truncate(4096)


CHANGES = {
    "norm": (with_another_norm, "safetensors was changed"),
    "length": (cut_short, "safetensors was changed"),
    "removal": (lambda folder: shard(folder).unlink(), "safetensors is gone"),
    "configuration": (
        lambda folder: edit_json(folder / "config.json", rms_norm_eps=0.1),
        "config.json was changed",
    ),
}


@pytest.fixture(scope="module")
def expected(dense, pruned, text, tmp_path_factory):
    """The weights of a run whose models stay as they are."""
    out = tmp_path_factory.mktemp("inputs") / "out"
    train({"student": pruned, "teacher": dense}, out, text, tokens=160)
    return shards(out)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_model_that_changes_during_the_work_ends_it(
    which, change, dense, pruned, text, expected, tmp_path
):
    folders, out = models(dense, pruned, tmp_path), tmp_path / "out"
    work, message = CHANGES[change]
    steps = []

    def progress(step):
        steps.append(step)
        if len(steps) == 3:
            work(folders[which])

    with pytest.raises((ValueError, FileNotFoundError), match=f"{which}/.*{message}"):
        train(folders, out, text, progress=progress, tokens=160)
    assert steps[-1].fraction == 1, "the training itself reads no file"
    assert not (out / INDEX_NAME).exists()
    shutil.copytree(pruned if which == "student" else dense, folders[which], dirs_exist_ok=True)
    train(folders, out, text, tokens=160)
    assert shards(out) == expected


@pytest.mark.parametrize(
    ("which", "named"),
    [("student", "checkpoint"), ("teacher", "teacher"), ("text", "text_sha256")],
)
def test_a_model_that_changed_since_is_not_trained_further(
    which, named, dense, pruned, text, tmp_path
):
    folders = models(dense, pruned, tmp_path)
    text = Path(shutil.copy(text, tmp_path))
    interrupt(train, folders, tmp_path / "out", text, progress=stop_at(0.6))
    if which == "text":
        text.write_text(text.read_text() + "No window that is hashed has this sentence.")
    else:
        with_another_norm(folders[which])
    assert_refused(FileExistsError, f"another {named}", train, folders, tmp_path / "out", text)
