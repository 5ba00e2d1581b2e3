"""Two runs into one folder: the second is refused and learns who holds the folder.

The lock that a killed run left stops no other run.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import prunus
from command_line import call
from prunus import pack
from prunus.model.checkpoint.lock import LOCK_NAME, locked
from prunus.sweeping.grid import Sweep
from prunus.sweeping.run import run_sweep
from recovery_cases import dense_checkpoint, pruned_checkpoint, recover, training_text
from tiny import tiny_checkpoint, token_ids

fcntl = pytest.importorskip("fcntl")
_HOLD = "import sys; from pathlib import Path; from prunus.model.checkpoint.lock import locked\n"
_HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def held(tmp_path):
    """A folder that another process holds."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == "held\n"
        yield tmp_path / "out", other
        other.stdin.close()
    assert not (tmp_path / "out").exists(), "nothing was written to it"


def test_every_verb_that_writes_is_refused_with_host_and_process(held, tmp_path):
    out, other = held
    dense = dense_checkpoint(tmp_path / "dense", dtype=torch.bfloat16)
    pruned = pruned_checkpoint(tmp_path / "pruned", dense)
    who = f"being written by another run: process {other.pid} on {socket.gethostname()}"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(FileExistsError, match=who):
        prunus.prune(dense, out, calibration=token_ids())
    with pytest.raises(FileExistsError, match=who):
        pack(pruned, out)
    with pytest.raises(FileExistsError, match=who):
        recover(pruned, out, "masked", training_text(tmp_path))
    sweep = {"title": "t", "models": [str(dense)], "grid": [{"method": "magnitude"}]}
    with pytest.raises(FileExistsError, match=who):
        run_sweep(Sweep.model_validate(sweep), out)
    save_file({"input_ids": token_ids()}, tmp_path / "ids.safetensors")
    options = ["--calibration", tmp_path / "ids.safetensors", "--samples", 6, "--seqlen", 16]
    assert who in " ".join(call("prune", dense, out, *options, status=2).output.split())
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_lock_of_a_killed_run_is_taken_over(held, tmp_path):
    out, other = held
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert json.loads((out / LOCK_NAME).read_text()) == {
        "host": socket.gethostname(),
        "pid": other.pid,
    }
    dense = tiny_checkpoint(tmp_path / "dense")
    assert prunus.prune(dense, out, calibration=token_ids()).state == "finished"
    assert not (out / LOCK_NAME).exists()
    for path in out.iterdir():
        path.unlink()
    out.rmdir()


def test_two_runs_one_after_the_other_and_a_failed_one(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense")
    with pytest.raises(ValueError, match="the calibration token ids run"):
        prunus.prune(dense, tmp_path / "deep" / "out", calibration=token_ids() + 1000)
    assert not (tmp_path / "deep").exists()
    prunus.prune(dense, tmp_path / "deep" / "out", calibration=token_ids())
    prunus.prune(dense, tmp_path / "deep" / "out", calibration=token_ids(), overwrite=True)
    assert not (tmp_path / "deep" / "out" / LOCK_NAME).exists()


def test_of_many_that_start_at_once_one_gets_in(tmp_path):
    """Three processes take and remove the lock over and over; never two hold it at a time."""
    script = (
        "import sys, os; from pathlib import Path\n"
        "from prunus.model.checkpoint.lock import locked\n"
        "out, won = Path(sys.argv[1]), 0\n"
        "while won < 40:\n"
        "    try:\n"
        "        with locked(out):\n"
        "            os.close(os.open(out / 'inside', os.O_CREAT | os.O_EXCL))\n"
        "            os.unlink(out / 'inside'); won += 1\n"
        "    except FileExistsError as fault:\n"
        "        assert 'another run' in str(fault), fault\n"
    )
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    crowd = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for one in crowd:
        assert one.wait(120) == 0, one.stderr.read() if one.stderr else ""
        if one.stderr:
            one.stderr.close()


@pytest.mark.parametrize(
    ("content", "refused"),
    [
        ({"host": "elsewhere", "pid": 1}, True),
        ({"host": socket.gethostname(), "pid": os.getppid()}, True),
        ({"host": socket.gethostname(), "pid": 2**22 + 7}, False),
        ({"host": socket.gethostname(), "pid": os.getpid()}, False),
        ({}, False),
        ("not json", False),
    ],
)
def test_where_files_cannot_be_locked_the_file_tells(content, refused, monkeypatch, tmp_path):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (tmp_path / LOCK_NAME).write_text(content if isinstance(content, str) else json.dumps(content))
    if refused:
        with (
            pytest.raises(FileExistsError, match=f"process {content['pid']} on {content['host']}"),
            locked(tmp_path),
        ):
            pass
        assert (tmp_path / LOCK_NAME).exists()
    else:
        with locked(tmp_path):
            pass
        assert not (tmp_path / LOCK_NAME).exists()


@pytest.mark.parametrize(
    "variables", [{"RANK": "1"}, {"RANK": "node7"}, {"RANK": "1", "WORLD_SIZE": "2"}]
)
def test_a_rank_that_torchrun_did_not_set_changes_nothing(held, variables, monkeypatch, tmp_path):
    """A shell or a scheduler may set RANK; the lock holds, and other folders can be used."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    out, _ = held
    dense = tiny_checkpoint(tmp_path / "dense")
    with pytest.raises(FileExistsError, match="being written by another run"):
        prunus.prune(dense, out, "magnitude", calibration=token_ids())
    done = prunus.prune(dense, tmp_path / "other", "magnitude", calibration=token_ids())
    assert done.state == "finished"


@pytest.mark.parametrize("kind", ["symbolic link", "hard link", "fifo", "folder", "large file"])
def test_what_is_no_lock_file_is_left_alone(kind, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious" if kind != "large file" else "precious" * 1000)
    out = tmp_path / "out"
    out.mkdir()
    lock = out / LOCK_NAME
    make = {
        "symbolic link": lambda: lock.symlink_to(victim),
        "hard link": lambda: os.link(victim, lock),
        "fifo": lambda: os.mkfifo(lock),
        "folder": lock.mkdir,
        "large file": lambda: lock.write_bytes(victim.read_bytes()),
    }
    make[kind]()
    before, names = victim.read_bytes(), sorted(os.listdir(out))
    with pytest.raises(FileExistsError, match=r"is not a lock file of prunus"), locked(out):
        pass
    assert victim.read_bytes() == before
    assert sorted(os.listdir(out)) == names


def test_a_link_to_nothing_creates_nothing(tmp_path):
    (tmp_path / LOCK_NAME).symlink_to(tmp_path / "new")
    with pytest.raises(FileExistsError, match=r"is not a lock file of prunus"), locked(tmp_path):
        pass
    assert not (tmp_path / "new").exists()


def test_the_lock_of_another_folder_with_the_same_name_stays(tmp_path):
    """Between lock and release, the folder is exchanged for one that another run holds."""
    with locked(tmp_path / "out"):
        (tmp_path / "out").rename(tmp_path / "moved")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / LOCK_NAME).write_text("{}")
    assert (tmp_path / "out" / LOCK_NAME).read_text() == "{}"
