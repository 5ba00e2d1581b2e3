"""One run at a time in a folder.

The lock is a file in the folder that the running process holds by flock(2) and that says who it is. The kernel lets go
of it when the process ends, however it ends: a file that nobody holds is what a killed run left, and is taken over.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunus.model.checkpoint.atomic_files import make_folder

__all__ = ["LOCK_NAME", "clear_stale_lock", "locked"]

LOCK_NAME = ".prunus.lock"
# What a file system says that knows no such locks; who holds one is then told from the file alone.
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made where it is not there, against other runs while the `with` lasts.

    Of processes that share one run (torchrun's), the one that writes holds it: rank 0.

    Raises:
        FileExistsError: another run holds it; names host and process id.
        OSError: the folder cannot be written.
    """
    if int(os.environ.get("RANK", "0")):
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    handle = _acquire(folder)
    try:
        yield
    finally:
        # The name goes while the lock is still held: whoever waits for it sees that it has another file than the name.
        with contextlib.suppress(OSError):
            (folder / LOCK_NAME).unlink(missing_ok=True)
        os.close(handle)
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()  # those that nothing was written to


def clear_stale_lock(folder: Path) -> None:
    """Take away the lock that a run left which was killed once its result was finished; never fails."""
    if (folder / LOCK_NAME).exists():
        with contextlib.suppress(OSError), locked(folder):
            pass


def _acquire(folder: Path) -> int:
    path = folder / LOCK_NAME
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _take(handle):
                raise FileExistsError(_refusal(folder, _holder(handle)))
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    _sign(handle)
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the name was given to another file in between: once more


def _take(handle: int) -> bool:
    """Get the lock of an open file, or False where another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return not _seems_alive(_holder(handle))
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as fault:
        if fault.errno not in _UNSUPPORTED:
            raise
        return not _seems_alive(_holder(handle))
    return True


def _sign(handle: int) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(
        handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode() + b"\n", 0
    )


def _holder(handle: int) -> dict[str, Any]:
    """Who signed an open lock file; empty where nobody did, or not yet."""
    try:
        content = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _seems_alive(holder: dict[str, Any]) -> bool:
    """Whether the process that signed is there; of another host's nothing is known, so it counts as there."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _refusal(folder: Path, holder: dict[str, Any]) -> str:
    who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}"
    return (
        f"{folder} is being written by another run: {who}. Wait until it ends, or choose another folder "
        f"({LOCK_NAME} in it is the lock; a run that was killed holds none)"
    )
