"""Models and texts that change: during the work, or between a kill and the resumed run."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from prunus.model.checkpoint.reader import INDEX_NAME
from recovery_cases import StopError, recover, shards, stop_at


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
    tensors = load_file(shard(folder))
    tensors["model.norm.weight"] *= 2
    save_file(tensors, shard(folder), metadata={"format": "pt"})


def cut_short(folder):
    """A mapped file would now kill the process that reads it."""
    with open(shard(folder), "r+b") as file:
        file.truncate(4096)


def with_another_configuration(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))


CHANGES = {
    "norm": (with_another_norm, "safetensors was changed"),
    "length": (cut_short, "safetensors was changed"),
    "removal": (lambda folder: shard(folder).unlink(), "safetensors is gone"),
    "configuration": (with_another_configuration, "config.json was changed"),
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
    with pytest.raises(StopError):
        train(folders, tmp_path / "out", text, progress=stop_at(0.6))
    before = shards(tmp_path / "out")
    if which == "text":
        text.write_text(text.read_text() + "No window that is hashed has this sentence.")
    else:
        with_another_norm(folders[which])
    with pytest.raises(FileExistsError, match=f"another {named}"):
        train(folders, tmp_path / "out", text)
    assert shards(tmp_path / "out") == before
