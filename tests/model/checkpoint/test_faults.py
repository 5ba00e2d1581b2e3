"""Faults: kills, full disks, read-only folders, shards that change, power cuts, rotten bits."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

import prunus
from command_line import call
from prunus.model.checkpoint import files
from prunus.model.checkpoint.files import recorded_digests, verify_shards
from prunus.model.checkpoint.lock import LOCK_NAME
from prunus.model.checkpoint.tensor_files import (
    INDEX_NAME,
    TENSOR_DTYPES,
    Checkpoint,
    save_safetensors,
)
from random_kills import audit, outcome, verbs
from recovery_cases import dense_checkpoint, pruned_checkpoint, recover
from refusals import assert_refused
from scripts import run_script
from stopping import interrupt
from tiny import token_ids

NO_SPACE = re.compile(
    r"^OSError: .*(No space left|os error 28)|^(RuntimeError|ValueError): .*(No space|os error 28)"
)
VERBS = ["prune", "compress", "recover-masked", "sweep"]
#: Pruning and recovery also die at each of their renames, in their own tests.
KILLS = {"prune": 6, "compress": 6, "recover-masked": 4, "sweep": 3}
if importlib.util.find_spec("gguf") and importlib.util.find_spec("accelerate"):
    KILLS["import"] = 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_runs_killed_at_random_moments_end_in_the_same_bytes(every, material, tmp_path):
    kills = KILLS
    if every:
        kills = {verb: 4 * count for verb, count in KILLS.items()}
        kills |= dict.fromkeys(verbs(material).keys() - KILLS.keys() - {"import"}, 8)
    wanted = [f"{verb}:{count}" for verb, count in kills.items()]
    results = run_script("random_kills.py", material, tmp_path, 2026, *wanted, timeout=850)
    fallen = Counter(result["verb"] for result in results)
    print(dict(fallen))
    assert sum(fallen.values()) >= 20, fallen
    assert all(fallen[verb] >= 0.5 * count for verb, count in kills.items()), fallen
    for result in results:
        assert result["audit"] == [], result
        assert result.get("status", 0) == 0, result
        assert result.get("differs", []) == [], result
        assert result.get("left", []) == [], result


# --- the disk is full ---


@pytest.fixture
def small_disk(tmp_path):
    mounted = []

    def make(size: int) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
        try:
            done = subprocess.run(options, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount here")
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_is_full_at_any_write(verb, material, small_disk, monkeypatch, tmp_path):
    """All files are whole, and with more space the same command ends in the same bytes."""
    work = verbs(material)[verb]
    work(tmp_path / "whole")
    expected = outcome(tmp_path / "whole")
    # A run checks the free space before it starts; here the space runs out during the run.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**60, total=2**60))
    total = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    failed = 0
    for share in (0.05, 0.3, 0.6, 0.9):
        disk = small_disk(int(total * share) // 4096 * 4096 + 4096)
        out = disk / "out"
        fault = None
        try:
            work(out)
        except Exception as caught:
            fault = caught
        failed += fault is not None
        assert fault is None or NO_SPACE.search(f"{type(fault).__name__}: {fault}"), fault
        assert (
            fault is None or verb != "prune" or re.search(r"must fit, and .* are free", str(fault))
        )
        assert audit(out) == []
        assert not list(out.rglob("*.partial"))
        subprocess.run(["mount", "-o", f"remount,size={8 * total + 2**20}", str(disk)], check=True)
        work(out)
        assert outcome(out) == expected
        assert not (out / LOCK_NAME).exists()
    if verb != "sweep":  # a sweep records the error of a cell and continues with the next
        assert failed >= 3


def test_a_command_on_a_full_disk_ends_in_one_line(material, small_disk, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: SimpleNamespace(free=12_345_678, total=2**60)
    )
    out = small_disk(32768) / "out"
    shown = call("prune", material / "dense", out, "--method", "magnitude", status=1).stderr
    assert re.match(
        "prunus: error: No space left on the disk for .*/out/model-00003", shown.splitlines()[-1]
    )
    assert "its 33.4 kB must fit, and 12.3 MB are free. Finished files are kept: make room" in shown
    assert "Errno" not in shown and "Error" not in shown


def test_a_disk_that_is_too_small_is_seen_before_any_work(material, small_disk):
    dense, disk = material / "dense", small_disk(65536)
    with pytest.raises(OSError, match=r"not enough disk for .* the result needs"):
        prunus.prune(dense, disk / "out", calibration=token_ids())
    assert list(disk.iterdir()) == []


# --- a folder that cannot be written ---


@pytest.mark.parametrize("verb", VERBS)
def test_an_output_that_is_read_only(verb, material, small_disk):
    disk = small_disk(2**22)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(OSError, match=r"out cannot be created: .* is not a folder that yo"):
        verbs(material)[verb](disk / "out")
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("name", ["n" * 250 + ".json", "é" * 120 + ".json"])
def test_a_long_name_is_no_reason_to_lose_figures(name, material, tmp_path):
    """The temporary name of a file is no longer than a name may be."""
    call("inspect", material / "dense", "--json", tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


# --- a shard that changes during the run ---


def test_a_shard_that_goes_between_the_check_and_the_reading(tmp_path, monkeypatch):
    checkpoint = Checkpoint(dense_checkpoint(tmp_path / "dense"))
    (tmp_path / "dense" / "model.safetensors").unlink()
    monkeypatch.setattr(checkpoint, "check_unchanged", lambda files: None)
    for read in (checkpoint.whole, lambda name: list(checkpoint.pieces(name))):
        assert_refused(
            FileNotFoundError, r"model\.safetensors is gone", read, next(iter(checkpoint.tensors))
        )


#: What happens to a shard of the source while a run reads it.
CHANGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: os.truncate(path, 4096),
    "replace": lambda path: os.replace(shutil.copy(path, path.with_name("new")), path),
    "rewrite": lambda path: os.utime(path, ns=(1, 1)),
    "remove": Path.unlink,
}


@pytest.mark.parametrize(
    ("verb", "change"),
    [*(("prune", change) for change in CHANGES), ("compress", "cut"), ("shrink", "cut")],
)
def test_a_shard_that_changes_while_it_is_read(verb, change, material, tmp_path):
    dense, out = shutil.copytree(material / "dense", tmp_path / "dense"), tmp_path / "out"
    path = dense / "model.safetensors"
    disturbed = []

    def disturb(*_):
        if not disturbed:
            disturbed.append(CHANGES[change](path))

    arguments = {"compress": {"bits": 4}, "shrink": {"blocks": 1}}.get(verb, {})
    options = {"calibration": token_ids(), "progress": disturb, **arguments}
    with pytest.raises(
        (ValueError, FileNotFoundError), match=r"model\.safetensors .*(changed|gone)"
    ):
        getattr(prunus, verb)(dense, out, **options)
    assert audit(out) == []
    assert not (out / INDEX_NAME).exists()


def test_a_tensor_that_was_read_does_not_depend_on_its_file(tmp_path):
    """Unlike a mapped one: pages that a file no longer has kill the process that touches them."""
    path = tmp_path / "model.safetensors"
    tensors = {
        f"{index}.weight": torch.randn(64, 100).to(dtype)
        for index, dtype in enumerate(TENSOR_DTYPES.values())
    }
    tensors |= {"none": torch.zeros(0, 3), "one": torch.ones((), dtype=torch.bfloat16)}
    save_file(tensors, path)
    checkpoint = Checkpoint(tmp_path)
    loaded = dict(checkpoint.read(tensors))
    os.truncate(path, 8000)
    assert {name: x.view(torch.uint8).tolist() if x.ndim else x for name, x in loaded.items()} == {
        name: x.view(torch.uint8).tolist() if x.ndim else x for name, x in tensors.items()
    }


# --- the output folder is exchanged ---


@pytest.mark.parametrize("verb", list(KILLS))
def test_nothing_is_written_through_a_link_that_takes_the_place_of_the_output(
    verb, material, monkeypatch, tmp_path
):
    work = verbs(material)[verb]
    work(tmp_path / "whole")
    out, moved, foreign = tmp_path / "out", tmp_path / "moved", tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model.safetensors.partial").write_text("of somebody else")
    renames, rename = 0, os.replace

    def exchange(source, target):
        nonlocal renames
        rename(source, target)
        renames += 1
        if renames == 2:
            out.rename(moved)
            out.symlink_to(foreign)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", exchange)
        with pytest.raises(FileExistsError, match="was exchanged for something else"):
            work(out)
    assert [path.name for path in foreign.iterdir()] == ["model.safetensors.partial"]
    assert audit(moved) == []
    out.unlink()
    moved.rename(out)
    work(out)
    assert outcome(out) == outcome(tmp_path / "whole")


# --- a power cut ---


@pytest.mark.parametrize("verb", VERBS)
def test_what_a_power_cut_can_leave(verb, material, monkeypatch, tmp_path):
    """No rename comes before its data is on disk, and no record before what it tells of.

    The content of a file survives a power cut from its fsync on, and a name from the fsync of its
    folder on. So the test watches these calls: at every rename, the content must be safe, and so
    must every earlier rename.
    """
    written: dict[tuple[int, int], bool] = {}
    pending: set[Path] = set()
    renamed: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle):
        place = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if place.is_dir():
            pending.difference_update({path for path in pending if path.parent == place})
        else:
            state = os.fstat(handle)
            written[state.st_ino, state.st_mtime_ns] = True
        real_fsync(handle)

    def replace(source, target):
        state, target = os.stat(source), Path(target)
        assert (state.st_ino, state.st_mtime_ns) in written, f"{target.name} before its data"
        assert not pending, f"{target.name} is renamed while {pending} may still be lost"
        real_replace(source, target)
        pending.add(target.resolve())
        renamed.append(target.name)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    out = tmp_path / "out"
    verbs(material)[verb](out)
    assert not pending
    # No file got its name in another way.
    names = {path.name for path in out.rglob("*") if path.is_file()}
    assert names <= set(renamed)
    if verb == "prune":
        last = [name for name in renamed if name in (INDEX_NAME, "prunus.json")]
        assert last[-2:] == [INDEX_NAME, "prunus.json"], "index, then finished record"
        first = renamed.index("model-00001-of-00003.safetensors")
        assert "prunus.json" in renamed[:first]
        assert renamed[first + 1] == "prunus.json"


def test_a_new_folder_lasts_before_what_is_in_it(monkeypatch, tmp_path):
    order = []
    monkeypatch.setattr(files, "fsync_folder", order.append)
    files.make_folder(tmp_path / "a" / "b")
    assert order == [tmp_path, tmp_path / "a"]
    order.clear()
    files.make_folder(tmp_path / "a" / "b")
    assert order == []


def test_equal_content_gives_equal_files(tmp_path):
    metadata = {f"key {number}": "é\n" * number for number in range(9)}
    for number in range(8):
        save_safetensors(tmp_path / f"{number}", {"a": torch.arange(5)}, metadata)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    with safe_open(tmp_path / "0", framework="pt") as file:
        assert file.metadata() == metadata | {"format": "pt"}
        assert torch.equal(file.get_tensor("a"), torch.arange(5))


def test_files_are_those_of_the_library(tmp_path):
    tensors = {
        f"{code}.{n}": torch.arange(n).to(dtype)
        for code, dtype in TENSOR_DTYPES.items()
        for n in (0, 3, 7)
    }
    tensors |= {"scalar": torch.tensor(3.0), "é.turned": torch.arange(6.0).reshape(2, 3).T}
    save_safetensors(tmp_path / "ours", tensors)
    library = save(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"}
    )
    assert (tmp_path / "ours").read_bytes() == library


# --- a bit of a written shard changes ---

CHANGED = "is not what was written: its SHA-256 is not the recorded one"


@pytest.fixture(scope="module")
def results(material, tmp_path_factory) -> Path:
    """A folder with results of every verb; no test writes to it."""
    folder = shutil.copytree(material, tmp_path_factory.mktemp("rot"), dirs_exist_ok=True)
    pruned_checkpoint(folder / "pruned-head", folder / "dense", head=True)
    prunus.compress(folder / "dense", folder / "compressed", 4, calibration=token_ids())
    short = {"tokens": 64, "evaluations": 1}
    recover(folder / "pruned", folder / "recovered", "masked", folder / "text.txt", **short)
    return folder


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def prune(results: Path, out: Path, **options: Any) -> Any:
    return prunus.prune(results / "dense", out, calibration=token_ids(), dtype="float32", **options)


@pytest.mark.parametrize("name", ["pruned", "pruned-head", "compressed", "recovered"])
def test_every_record_holds_the_digest_of_every_shard(name, results):
    folder = results / name
    shards = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("*.safetensors")
    }
    assert recorded_digests(folder) == shards
    assert set(json.loads((folder / INDEX_NAME).read_text())["weight_map"].values()) == set(shards)
    assert verify_shards(folder) == len(shards)


@pytest.mark.parametrize(("number", "blocks"), [(1, 1), (3, 1), (2, 2)])
def test_resume_refuses_a_changed_shard_and_makes_a_removed_one_again(
    number, blocks, results, tmp_path
):
    out, shard = tmp_path / "out", f"model-0000{number}-of-00003.safetensors"
    interrupt(prune, results, out, after=blocks)
    flip(out / shard)
    assert_refused(ValueError, rf"{shard} {CHANGED}.* remove it", prune, results, out)
    (out / shard).unlink()
    assert prune(results, out).state == "finished"
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == (results / "pruned" / path.name).read_bytes()
    assert verify_shards(out) == 3


def test_inspect_verifies_on_request(results, tmp_path):
    shutil.copytree(results / "pruned", tmp_path / "model")
    shown = call("inspect", tmp_path / "model", "--verify").output
    assert "shards that have the bytes that were written: 3" in shown
    flip(tmp_path / "model" / "model-00002-of-00003.safetensors")
    assert "bytes that were written" not in call("inspect", tmp_path / "model").output
    refused = call("inspect", tmp_path / "model", "--verify", status=2).output
    assert "model-00002-of-00003.safetensors differ from the SHA-256" in " ".join(refused.split())
    assert prunus.inspect(results / "compressed", verify=True).verified == 3


def test_what_cannot_be_verified_is_an_error(results, tmp_path):
    assert_refused(
        FileNotFoundError, "prunus did not write it", prunus.inspect, results / "dense", verify=True
    )
    shutil.copytree(results / "pruned", tmp_path / "model")
    last = "model-00003-of-00003.safetensors"
    (tmp_path / "model" / last).unlink()
    assert_refused(FileNotFoundError, rf"has lost {last}", verify_shards, tmp_path / "model")
    shutil.copy(results / "pruned" / last, tmp_path / "model")
    shutil.copy(results / "pruned" / last, tmp_path / "model" / "more.safetensors")
    assert_refused(ValueError, r"more\.safetensors differ", verify_shards, tmp_path / "model")


@pytest.mark.parametrize("damage", [{"sha256": []}, {"sha256": {"a": 1}}, []])
def test_a_damaged_record_is_an_error(damage, tmp_path):
    (tmp_path / "prunus.json").write_text(json.dumps(damage))
    assert_refused(ValueError, r"prunus\.json is damaged", recorded_digests, tmp_path)
