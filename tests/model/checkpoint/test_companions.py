"""Files of a stranger's checkpoint: links that lead out of it, special files, cards in any code.

A mistake shows before any work, names the file, and leaves no folder behind.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prunus
from prunus.model.checkpoint import files
from prunus.model.checkpoint.files import read_json, replacing, write_text
from prunus.model.checkpoint.tensor_files import INDEX_NAME
from prunus.pruning.recipe import Recipe
from recovery_cases import recover
from tiny import token_ids

LATIN_1 = "# Modèle élagué\n".encode("latin-1")


#: Verb -> the checkpoint that it takes, and the verb.
VERBS: dict[str, tuple[str, Callable[[Path, Path, Path], Any]]] = {
    "prune": (
        "dense",
        lambda model, out, _: prunus.prune(model, out, calibration=token_ids(), dtype="float32"),
    ),
    "compress": (
        "dense",
        lambda model, out, _: prunus.compress(model, out, 8, calibration=token_ids()),
    ),
    "recover": (
        "pruned",
        lambda model, out, text: recover(model, out, "masked", text, tokens=64, evaluations=1),
    ),
}


def run(verb: str, material: Path, tmp_path: Path, change: Callable[[Path], None]) -> Path:
    """Run a verb on a changed copy of its checkpoint; returns the folder of the result."""
    name, work = VERBS[verb]
    model = tmp_path / "model"
    shutil.copytree(material / name, model)
    change(model)
    work(model, tmp_path / "out", material / "text.txt")
    return tmp_path / "out"


# --- links ---


def replace(model: Path, name: str, make: Callable[[Path], object]) -> None:
    """Put something in the place of a file; `shard` is the first shard."""
    path = min(model.glob("*.safetensors")) if name == "shard" else model / name
    path.unlink(missing_ok=True)
    make(path)


@pytest.mark.parametrize("verb", VERBS)
def test_a_link_that_leads_out_is_refused_by_name(verb, material, tmp_path):
    secret = tmp_path / "secret"
    shutil.copy(min((material / VERBS[verb][0]).glob("*.safetensors")), secret)
    for name in ("notes.txt", "README.md", "prunus.json", "shard"):
        if name == "prunus.json" and verb == "prune":
            continue  # it writes its own
        place = tmp_path / name
        place.mkdir()
        with pytest.raises(ValueError, match=r"is a link to .*secret, outside of the checkpoint"):
            run(verb, material, place, lambda m: replace(m, name, lambda p: p.symlink_to(secret)))  # noqa: B023
        assert os.listdir(place) == ["model"]


@pytest.mark.parametrize("verb", VERBS)
def test_links_inside_the_folder_and_into_the_cache_are_followed(verb, material, tmp_path):
    """A snapshot of the hub: every file is a link to ../../blobs."""
    name, work = VERBS[verb]
    snapshot = tmp_path / "models--o--n" / "snapshots" / "0123"
    blobs = tmp_path / "models--o--n" / "blobs"
    shutil.copytree(material / name, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    (snapshot / "notes.txt").write_text("notes")
    (snapshot / "again.txt").symlink_to("notes.txt")
    work(snapshot, tmp_path / "out", material / "text.txt")
    assert (tmp_path / "out" / "again.txt").read_text() == "notes"
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / INDEX_NAME).exists()


def test_a_link_under_the_name_of_a_file_is_replaced_and_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "result.json").symlink_to(victim)
    for suffix in (".partial", ".0.partial"):
        (tmp_path / f"result.json{suffix}").symlink_to(victim)
    write_text(tmp_path / "result.json", "new")
    assert victim.read_text() == "precious"
    assert (tmp_path / "result.json").read_text() == "new"
    assert not (tmp_path / "result.json").is_symlink()


def test_a_link_under_a_temporary_name_ends_the_write(monkeypatch, tmp_path):
    """The name cannot be guessed; if it is there nevertheless, nothing is written through it."""
    monkeypatch.setattr("secrets.token_hex", lambda _: "known")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "a.known.partial").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "a", "new")
    assert victim.read_text() == "precious"


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as other:
        one.write(b"one")
        other.write(b"other")
    assert (tmp_path / "a").read_text() == "one", "the one that ended last"
    assert os.listdir(tmp_path) == ["a"]


# --- special files ---


#: What somebody may put in the place of a file, and how an error names it.
SPECIAL: list[tuple[Callable[[Path], object], str]] = [
    (os.mkfifo, "a FIFO"),
    (
        lambda path: path.symlink_to("/dev/zero"),
        "a character device, through the link to /dev/zero",
    ),
    (Path.mkdir, "a folder"),
]


@pytest.mark.parametrize("verb", VERBS)
def test_a_special_file_is_refused_by_name(verb, material, tmp_path):
    for name in ("shard", "config.json", "tokenizer.json", "README.md", "notes.txt", INDEX_NAME):
        for number, (make, named) in enumerate(SPECIAL[:2]):
            place = tmp_path / f"{name} {number}"
            place.mkdir()
            with pytest.raises(ValueError, match=f"is {named}; expected a regular file"):
                run(verb, material, place, lambda model: replace(model, name, make))  # noqa: B023
            assert os.listdir(place) == ["model"]


def test_special_files_in_the_output_folder_and_for_records(material, tmp_path):
    for number, (make, named) in enumerate(SPECIAL):
        path = tmp_path / f"{number}.toml"
        make(path)
        for read in (read_json, lambda path: Recipe.read(path, {})):
            with pytest.raises(ValueError, match=f"toml is {named}; expected a regular file"):
                read(path)
        for name in ("prunus.json", "model-00001-of-00003.safetensors"):
            out = tmp_path / f"{number} {name}"
            shutil.copytree(material / "pruned", out)
            replace(out, name, make)
            with pytest.raises((ValueError, FileExistsError), match="expected a regular file"):
                prunus.prune(material / "dense", out, calibration=token_ids(), dtype="float32")


def test_a_file_that_is_too_large_is_refused_before_it_is_read(monkeypatch, tmp_path):
    monkeypatch.setitem(files._MAX_BYTES, ".json", 5)
    (tmp_path / "a.json").write_text("[1,2]")
    assert read_json(tmp_path / "a.json") == [1, 2]
    (tmp_path / "a.json").write_text("[1,23]")
    with pytest.raises(ValueError, match=r"has 6 bytes, and a file of this kind may have 5"):
        read_json(tmp_path / "a.json")


def test_a_model_card_of_a_terabyte(material, tmp_path):
    """A sparse file: it has a length and takes no disk."""

    def change(model: Path) -> None:
        with (model / "README.md").open("wb") as file:
            file.truncate(2**40)

    with pytest.raises(ValueError, match=r"README\.md has 1,099,511,627,776 bytes"):
        run("recover", material, tmp_path, change)
    assert os.listdir(tmp_path) == ["model"]


# --- cards that are not UTF-8 ---


@pytest.mark.parametrize("verb", VERBS)
def test_a_card_in_latin_1_is_no_reason_to_fail(verb, material, tmp_path):
    out = run(verb, material, tmp_path, lambda m: (m / "README.md").write_bytes(LATIN_1) and None)
    card = (out / "README.md").read_text("utf-8")
    assert verb != "recover" or "# Mod\ufffdle \ufffdlagu\ufffd\n" in card


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file: run it as a user")
def test_a_companion_that_cannot_be_read_shows_before_any_work(verb, material, tmp_path):
    with pytest.raises(OSError, match=r"notes\.txt"):
        run(verb, material, tmp_path, lambda m: (m / "notes.txt").touch(0o000))
    assert os.listdir(tmp_path) == ["model"]
