"""Runs scripts of this folder in processes of their own."""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from places import SUPPORT


def run_script(name: str, *arguments: object, timeout: float | None = None) -> Any:
    """Run `tests/support/NAME` on one thread, and return the JSON of its last line of output.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    return _result(fork_script(name, *arguments, timeout=timeout))


def run_fresh_script(name: str, *arguments: object) -> Any:
    """The same in a new interpreter, for scripts that must act before torch is imported."""
    return _result(
        subprocess.run(
            [sys.executable, str(SUPPORT / name), *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env=_environment(),
        )
    )


def fork_script(
    name: str, *arguments: object, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script in a fork of one process that has imported torch and prunus."""
    return _server().run([str(SUPPORT / name), *map(str, arguments)], timeout)


def _result(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _environment() -> dict[str, str]:
    """Of a script, and of the server of scripts.

    Both fork. A fork has one thread, and no other thread may hold a lock at that moment, as the
    threads of torch and of transformers' loading would.
    """
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_DEACTIVATE_ASYNC_LOAD": "1"}


@cache
def _server() -> "_Server":
    server = _Server()
    atexit.register(server.close)
    return server


class _Server:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SUPPORT / "script_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            text=True,
            start_new_session=True,
        )

    def run(self, command: list[str], timeout: float | None) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory() as folder:
            out, errors = Path(folder, "out"), Path(folder, "errors")
            out.touch()
            errors.touch()
            request = {
                "script": command[0],
                "arguments": command[1:],
                "environment": _environment(),
                "out": str(out),
                "errors": str(errors),
            }
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], timeout)[0]:
                # The script is a child of this process and in its session.
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
                _server.cache_clear()
                raise subprocess.TimeoutExpired(command, timeout)
            status = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(command, status, out.read_text(), errors.read_text())

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(timeout=60)
