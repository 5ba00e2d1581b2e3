"""Two runs into one folder: the second is refused and learns who holds the folder.

The lock that a killed run left stops no other run. A run that is slow between its look at the
folder and its lock finds what happened there.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prunus
from command_line import call
from prunus.model.checkpoint import lock
from prunus.model.checkpoint.lock import LOCK_NAME, locked
from prunus.sweeping.grid import Sweep
from prunus.sweeping.sweep import sweep as run_sweep
from random_kills import verbs as verbs_of_kills
from recovery_cases import recover
from refusals import assert_refused
from tiny import token_ids, tree

_HOLD = "import sys; from pathlib import Path; from prunus.model.checkpoint.lock import locked\n"
_HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def held(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "held\n"
        yield tmp_path / "out", other
        other.stdin.close()
    assert not (tmp_path / "out").exists(), "nothing was written to it"


def test_every_verb_that_writes_is_refused_with_host_and_process(held, material):
    out, other = held
    who = f"being written by another run: process {other.pid} on {socket.gethostname()}"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    writing = verbs_of_kills(material)
    assert writing.keys() >= {"prune", "compress", "shrink", "recover-masked", "sweep"}
    for verb in writing.keys() - {"import"}:
        assert_refused(FileExistsError, who, writing[verb], out)
    options = ["--calibration", material / "ids.safetensors", "--samples", 6, "--seqlen", 16]
    shown = call("prune", material / "dense", out, *options, status=2).output
    assert who in " ".join(shown.split())
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_lock_of_a_killed_run_is_taken_over(dense, held, tmp_path):
    out, other = held
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert json.loads((out / LOCK_NAME).read_text()) == {
        "host": socket.gethostname(),
        "pid": other.pid,
    }
    assert prunus.prune(dense, out, calibration=token_ids()).state == "finished"
    assert not (out / LOCK_NAME).exists()
    for path in out.iterdir():
        path.unlink()
    out.rmdir()


def test_two_runs_one_after_the_other_and_a_failed_one(dense, tmp_path):
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
        "out, won, forks = Path(sys.argv[1]), 0, [os.fork()]\n"
        "forks += [os.fork()] if forks[0] else []\n"
        "while won < 40:\n"
        "    try:\n"
        "        with locked(out):\n"
        "            os.close(os.open(out / 'inside', os.O_CREAT | os.O_EXCL))\n"
        "            os.unlink(out / 'inside'); won += 1\n"
        "    except FileExistsError as fault:\n"
        "        assert 'another run' in str(fault), fault\n"
        "assert not all(forks) or not any(os.waitpid(child, 0)[1] for child in forks)\n"
    )
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


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

    monkeypatch.setattr("fcntl.flock", unsupported)
    (tmp_path / LOCK_NAME).write_text(content if isinstance(content, str) else json.dumps(content))
    with contextlib.ExitStack() as stack:
        if refused:
            who = f"process {content['pid']} on {content['host']}"
            stack.enter_context(pytest.raises(FileExistsError, match=who))
        stack.enter_context(locked(tmp_path))
    assert (tmp_path / LOCK_NAME).exists() == refused


def test_what_is_no_lock_file_is_left_alone(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious" * 1000)
    makers: dict[str, Callable[[Path], object]] = {
        "symbolic link": lambda lock: lock.symlink_to(victim),
        "link to nothing": lambda lock: lock.symlink_to(tmp_path / "new"),
        "hard link": lambda lock: os.link(victim, lock),
        "fifo": os.mkfifo,
        "folder": Path.mkdir,
        "large file": lambda lock: lock.write_bytes(victim.read_bytes()),
    }
    for kind, make in makers.items():
        out = tmp_path / kind
        out.mkdir()
        make(out / LOCK_NAME)
        with pytest.raises(FileExistsError, match=r"is not a lock file of prunus"), locked(out):
            pass
        assert victim.read_text() == "precious" * 1000
        assert os.listdir(out) == [LOCK_NAME]
    assert not (tmp_path / "new").exists()


def test_the_lock_of_another_folder_with_the_same_name_stays(tmp_path):
    """Between lock and release, the folder is exchanged for one that another run holds."""
    with locked(tmp_path / "out"):
        (tmp_path / "out").rename(tmp_path / "moved")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / LOCK_NAME).write_text("{}")
    assert (tmp_path / "out" / LOCK_NAME).read_text() == "{}"


# --- races: a run that is slow between its look at the folder and its lock ---


@pytest.fixture
def between_look_and_lock(monkeypatch):
    """A function that runs `work` on a folder in the moment before the next lock is taken.

    It returns what the folder holds after that, once it has happened.
    """
    acquire = lock._acquire
    left: dict[str, bytes] = {}

    def arrange(work: Callable[[Path], Any], out: Path) -> dict[str, bytes]:
        def acquire_later(folder: Path) -> int:
            monkeypatch.setattr(lock, "_acquire", acquire)
            work(out)
            left.update(tree(out))
            return acquire(folder)

        monkeypatch.setattr(lock, "_acquire", acquire_later)
        return left

    return arrange


def sweep_of(dense: Path, ids: Path, sparsity: float) -> Sweep:
    return Sweep.model_validate(
        {
            "title": "t",
            "models": [str(dense)],
            "recipe": {"calibration": str(ids), "samples": 3, "seqlen": 16, "dtype": "float32"},
            "scoring": {"texts": [str(ids)], "seqlen": 16, "samples": 2},
            "grid": [{"method": "magnitude", "sparsity": sparsity}],
            "keep_checkpoints": True,
        }
    )


def verbs(material: Path) -> dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]]:
    """Verb -> two commands that write different results."""
    dense, text = material / "dense", material / "text.txt"
    ids = material / "ids.safetensors"
    found: dict[str, Any] = {
        "prune": [
            lambda out, s=s: prunus.prune(dense, out, "magnitude", s, dtype="float32")
            for s in (0.3, 0.7)
        ],
        "compress": [
            lambda out, b=b: prunus.compress(
                dense, out, b, calibration=token_ids(), dtype="float32"
            )
            for b in (4, 8)
        ],
        "recover": [
            lambda out, n=n: recover(
                material / "pruned", out, "masked", text, evaluations=1, tokens=n
            )
            for n in (64, 128)
        ],
        "sweep": [lambda out, s=s: run_sweep(sweep_of(dense, ids, s), out) for s in (0.3, 0.7)],
    }
    return found


@pytest.mark.parametrize("verb", ["prune", "compress", "recover", "sweep"])
def test_what_another_run_finished_meanwhile_is_not_destroyed(
    verb, material, between_look_and_lock, tmp_path
):
    first, second = verbs(material)[verb]
    before = between_look_and_lock(first, tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"another|set of cells"):
        second(tmp_path / "out")
    assert before
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("verb", ["prune", "compress", "recover"])
def test_the_same_command_twice_gives_one_result(verb, material, between_look_and_lock, tmp_path):
    """The second command finds the result of the first, and ends well without work."""
    first, _ = verbs(material)[verb]
    before = between_look_and_lock(first, tmp_path / "out")
    first(tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_an_import_replaces_what_another_run_finished_only_if_it_may(
    material, between_look_and_lock, tmp_path
):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from prunus.formats.gguf.import_checkpoint import import_gguf

    file, out = material / "tiny.gguf", tmp_path / "out"
    with lock.locked(out):
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match="being written"):
                import_gguf(file, out, overwrite=overwrite)
        assert os.listdir(tmp_path) == ["out"]
    prune = verbs(material)["prune"][0]
    between_look_and_lock(prune, out)
    with pytest.raises(FileExistsError, match="holds no result of prunus import"):
        import_gguf(file, out, overwrite=True)
    assert (out / "prunus.json").exists()
    shutil.rmtree(out)
    between_look_and_lock(lambda out: import_gguf(file, out), out)
    with pytest.raises(FileExistsError, match="holds a finished import"):
        import_gguf(file, out)
    between_look_and_lock(lambda out: import_gguf(file, out, overwrite=True), out)
    import_gguf(file, out, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
