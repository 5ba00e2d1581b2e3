"""One run at a time in a folder.

The lock is a file in the folder. The running process holds it with flock(2), and the file says
which process that is. The kernel releases the lock when the process ends, in whatever way. A lock
file that nobody holds was left by a killed run, and the next run takes it over: no run needs the
help of its user after a kill, which a lock that is a mere file would need.
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
# Errors of file systems without flock, such as some network file systems. There the process id in
# the file decides.
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` against other runs for the length of a `with` block.

    Makes the folder if it is missing, and removes what it made if nothing was written there. Of
    the processes of one run under torchrun, only rank 0 writes, so only rank 0 holds the lock.

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
        # The name goes first and the lock second. In the other order, a run that takes the lock in
        # between would hold a file that has lost its name, and a third run could enter.
        with contextlib.suppress(OSError):
            (folder / LOCK_NAME).unlink(missing_ok=True)
        os.close(handle)
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()  # fails, as it should, for a folder with something in it


def clear_stale_lock(folder: Path) -> None:
    """Remove the lock of a run that was killed after its result was finished. Never fails."""
    if (folder / LOCK_NAME).exists():
        with contextlib.suppress(OSError), locked(folder):
            pass


def _acquire(folder: Path) -> int:
    """The handle of the lock file, with the lock held and this process signed in."""
    path = folder / LOCK_NAME
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _take(handle):
                raise FileExistsError(_refusal(folder, _holder(handle)))
            # Between open and lock, the previous holder may have removed the name, and another run
            # may have made a new file. The lock counts only on the file that has the name now.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    _sign(handle)
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _take(handle: int) -> bool:
    """Take the lock of an open file; False if another process has it."""
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
    """Write host and process id into the lock file, for the messages of other runs."""
    os.ftruncate(handle, 0)
    os.pwrite(
        handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode() + b"\n", 0
    )


def _holder(handle: int) -> dict[str, Any]:
    """Host and process id in an open lock file; empty if there are none, or none yet."""
    try:
        content = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _seems_alive(holder: dict[str, Any]) -> bool:
    """Whether the process that signed still runs.

    A process of another host counts as running: its process id says nothing here.
    """
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)  # signal 0 only checks that the process exists
    except ProcessLookupError:
        return False
    except OSError:  # it exists and belongs to another user
        pass
    return True


def _refusal(folder: Path, holder: dict[str, Any]) -> str:
    who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}"
    return (
        f"{folder} is being written by another run: {who}. Wait until it ends, or choose another "
        f"folder ({LOCK_NAME} in it is the lock; a run that was killed holds none)"
    )
